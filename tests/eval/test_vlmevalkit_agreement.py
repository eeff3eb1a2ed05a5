"""Our numbers are VLMEvalKit's on the same predictions.

`vlmevalkit_golden.json` holds what VLMEvalKit (ms-vlmeval 0.0.20) answered on 2026-11-23 for the predictions made here.
With VLMEVALKIT_PYTHON, an interpreter that can import `vlmeval`, it is asked again.
"""

import base64
import csv
import io
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.benchmarks import score, write_sheet
from llava.eval.questions import read_tsv

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "vlmevalkit_golden.json").read_text())
WORDS = ["red circle", "blue square", "Dog", "hot dog", "12", "3.5", "a cat", "the left one", "Cannot", "isn't", "two"]
FRAMES = [
    "{}", "{}.", "({})", "The answer is {}", "The answer is {}.", "**{}**", "Answer: {}", "{} because it is so", "I see {}, no doubt",
    "It is {} or maybe A", "{}\nB", "A {} in the image", "Is it {}? Yes.", "No, {}", "yes/no {}", "Sorry, I can't help with images of people yet.",
    "{}, {}", "It cannot be said in so few words what {} means here, since there are many more words than options have", "\t{} ", "1,000 {}",
    "{}; no-one", "dont {}", "{}%", "Not {}", "",
]  # fmt: skip


def tsv(path: Path, rows: list[dict]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    columns = list(dict.fromkeys(["index", "image", *(key for row in rows for key in row)]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows({**row, "image": image} for row in rows)


def benchmark(name: str) -> tuple[list[dict], list[str]]:
    """Rows and answers, right and wrong ones in many forms, the same every time."""
    rng = random.Random(name)
    rows, said = [], []
    for number in range(240):
        row = {
            "index": str(number),
            "question": f"What is number {number}?",
            "category": rng.choice(["CP", "LR", "OCR"]),
        }
        rows.append(row)
        frame = rng.choice(FRAMES)
        if name in ("MMStar", "MMBench_DEV_EN"):
            options = dict(zip("ABCD", rng.sample(WORDS, 4), strict=True))
            letter = rng.choice("ABCD")
            row.update({**options, "answer": letter})
            likely = letter if rng.random() < 0.6 else rng.choice("ABCDZ")
            if name == "MMBench_DEV_EN":
                row["index"] = str(number // 3 + 1 + 1_000_000 * (number % 3))
                frame = rng.choice([frame, "{}", "{}", "{}.", "({})"])
                likely = letter if rng.random() < 0.9 else likely
            said.append(frame.replace("{}", rng.choice([likely, likely, options.get(likely, "Z")])))
        elif name in ("POPE", "MME"):
            row["answer"] = rng.choice(["Yes", "No"])
            row["image_path"] = f"{number // 2}.png"
            if name == "POPE":
                row["category"] = rng.choice(["adversarial", "popular,random", "adversarial,popular,random"])
            else:
                row["category"] = ["OCR", "color", "code_reasoning", "scene"][number // 2 % 4]
            said.append(frame.replace("{}", rng.choice(["Yes", "No", row["answer"], row["answer"].lower(), "maybe"])))
        else:
            answers = [
                rng.choice([*WORDS, "50%", "0", "7.25", "1,000"]) for _ in range(10 if name == "TextVQA_VAL" else 2)
            ]
            if name == "TextVQA_VAL":
                answers = [rng.choice(answers[:3]) for _ in answers]
            many = name in ("TextVQA_VAL", "OCRBench") or (rng.random() < 0.5 and not name.startswith("GQA"))
            row["answer"] = str(answers) if many else answers[0]
            if name == "OCRBench":
                row["category"] = rng.choice(
                    ["Regular Text Recognition", "Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"]
                )
            near = answers[0] if rng.random() < 0.6 else rng.choice([*WORDS, "51%", "7.5", "0.0", "1000", "hot dogs"])
            said.append(rng.choice([frame, "{}", "{}"]).replace("{}", near))
    return rows, said


NAMES = [
    "MMStar",
    "MMBench_DEV_EN",
    "POPE",
    "MME",
    "ChartQA_TEST",
    "DocVQA_VAL",
    "TextVQA_VAL",
    "OCRVQA_TESTCORE",
    "OCRBench",
]
NAMES.append("GQA_TestDev_Balanced")
THEIRS = {
    "MMStar": ("Overall", 100),
    "MMBench_DEV_EN": ("Overall", 100),
    "MME": ("perception", 1),
    "OCRBench": ("Final Score Norm", 1),
}
DETAILS = {
    "POPE": {"acc": "accuracy", "precision": "precision", "recall": "recall"},
    "MME": {"reasoning": "reasoning", "color": "color", "scene": "scene"},
}


def written(folder: Path, name: str) -> dict:
    """Write the benchmark and the answers; returns our result."""
    rows, said = benchmark(name)
    tsv(folder / f"{name}.tsv", rows)
    read = read_tsv(folder / f"{name}.tsv")
    answers = {row["index"]: text for row, text in zip(read, said, strict=True)}
    write_sheet(folder / "model" / f"model_{name}.xlsx", read, answers)
    return score(name, read, answers, None)[1]


def agrees(name: str, ours: dict, theirs: dict[str, float]) -> None:
    key, scale = THEIRS.get(name, ("Overall", 1))
    assert ours["value"] == pytest.approx(scale * theirs[key], abs=1e-6), name
    assert 5 < ours["value"] < 1900  # answers are neither all right nor all wrong
    for key, own in DETAILS.get(name, {}).items():
        assert ours["details"][own] == pytest.approx(theirs[key], abs=1e-6), (name, key)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_is_the_one_vlmevalkit_gave(tmp_path, name):
    agrees(name, written(tmp_path, name), GOLDEN[name])


@pytest.mark.skipif("VLMEVALKIT_PYTHON" not in os.environ, reason="set VLMEVALKIT_PYTHON to ask VLMEvalKit itself")
def test_vlmevalkit_itself_agrees(tmp_path):
    ours = {name: written(tmp_path, name) for name in NAMES}
    files = [f"{name}={tmp_path}/model/model_{name}.xlsx" for name in NAMES]
    command = [os.environ["VLMEVALKIT_PYTHON"], str(HERE / "vlmevalkit_scores.py"), *files]
    done = subprocess.run(command, env={**os.environ, "LMUData": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        agrees(name, ours[name], theirs[name])
    assert theirs == GOLDEN
