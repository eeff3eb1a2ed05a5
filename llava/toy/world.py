"""The toy world on disk: the same files, in the same formats, that a real user brings.

    python -m llava.toy.world --output runs/quickstart/world --seed 0

| file | what real file it stands for |
|---|---|
| align.json | blip_laion_cc_sbu_558k.json: image, short caption |
| captioned.json | ALLaVA-Caption-VFLAN-4V: image, question, detailed caption |
| reasoning.jsonl | LLaVA-CoT-100k train.jsonl: question, answer in four tags, no `<image>` |
| instructions.json | the stage 2 mix: conversations of descriptions, short answers, choices; text-only rows |
| text_only.jsonl | text-only rows for the stage 1.5 mix |
| unlabelled_images.json | images to caption |
| unlabelled_questions.json | image-question pairs to answer |
| references.jsonl | what the unlabelled images show, to measure captions by |
| benchmarks/*.tsv | VLMEvalKit TSVs: base64 image, question, options, answer |
| truth.jsonl | what each image shows, read only by the offline annotator |

Each split has scenes of its own; nothing in a benchmark occurs in training.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import random
from dataclasses import asdict
from pathlib import Path

from llava.prompts import ANSWER_SHORT, with_image
from llava.records import write_json, write_records
from llava.toy import texts
from llava.toy.scenes import Scene, render, sample_scene

ALIGN_QUESTIONS = (
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "What is in the photo?",
    "Describe the image concisely.",
)
CAPTION_QUESTIONS = (
    "Please describe the image in detail.",
    "What do you see in this image?",
    "Please generate a detailed caption of this image.",
)
BENCHMARKS = {
    "ToyMCQ": ("color", "shape", "place"),
    "ToyVQA": ("color", "shape", "place"),  # the same kinds of question, answered in words
    "ToyPOPE": ("exists",),
    "ToyCount": ("count",),
    "ToyRelation": ("relation",),
    "ToyOCR": ("reading",),
}
# number of scenes per split, in seed order; benchmarks come first so that changing a training split moves no test
SPLITS = {
    "benchmark": 600,
    "align": 3000,
    "captioned": 500,
    "reasoning": 500,
    "instructions": 5000,
    "unlabelled_images": 360,
    "unlabelled_questions": 360,
}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return buffer.getvalue()


class World:
    """Writes scenes as images below `folder/images` and remembers what they show."""

    def __init__(self, folder: Path, seed: int, scale: float):
        self.folder, self.truth = folder, []
        counts = {split: max(int(count * scale), 2) for split, count in SPLITS.items()}
        start, self.scenes = seed * 1_000_000, {}
        for split, count in counts.items():
            self.scenes[split] = [sample_scene(start + index) for index in range(count)]
            start += 20_000
        self.rng = random.Random(f"world/{seed}")

    def image(self, split: str, scene: Scene) -> str:
        """Write the scene's PNG and return its path relative to the world."""
        name = f"images/{split}/{scene.seed:08d}.png"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = png(scene)
        path.write_bytes(data)
        self.truth.append({"id": name, "sha256": hashlib.sha256(data).hexdigest(), "scene": asdict(scene)})
        return name

    def record(self, split: str, scene: Scene, *turns: dict[str, str]) -> dict:
        return {"id": f"{split}-{scene.seed:08d}", "image": self.image(split, scene), "conversations": list(turns)}

    def align(self) -> list[dict]:
        records = []
        for scene in self.scenes["align"]:
            question = self.rng.choice(ALIGN_QUESTIONS)
            placed = f"<image>\n{question}" if self.rng.random() < 0.5 else f"{question}\n<image>"
            records.append(self.record("align", scene, human(placed), gpt(texts.short_caption(scene))))
        return records

    def captioned(self) -> list[dict]:
        records = []
        for scene in self.scenes["captioned"]:
            question = with_image(self.rng.choice(CAPTION_QUESTIONS))
            record = self.record("captioned", scene, human(question), gpt(texts.description(scene)))
            records.append({**record, "caption": texts.short_caption(scene)})
        return records

    def reasoning(self) -> list[dict]:
        records = []
        for scene in self.scenes["reasoning"]:
            question = self.rng.choice(texts.questions(scene, self.rng))
            asked = f"{question.text} {ANSWER_SHORT}" if self.rng.random() < 0.5 else question.text
            answer = texts.tagged_reasoning(scene, question)
            records.append(self.record("reasoning", scene, human(asked), gpt(answer)))
        return records

    def instructions(self) -> list[dict]:
        """Conversations of several turns: a description in every other one, then questions."""
        records = []
        for scene in self.scenes["instructions"]:
            pairs = []
            if self.rng.random() < 0.5:
                pairs.append((self.rng.choice(CAPTION_QUESTIONS), texts.description(scene)))
            for question in self.rng.sample(texts.questions(scene, self.rng), 3):
                if len(question.options) > 2 and self.rng.random() < 0.4:
                    pairs.append(texts.lettered(question, self.rng))
                else:
                    pairs.append((f"{question.text}\n{ANSWER_SHORT}", question.answer))
            pairs[0] = (with_image(pairs[0][0]), pairs[0][1])
            turns = [turn for asked, answer in pairs for turn in (human(asked), gpt(answer))]
            records.append(self.record("instructions", scene, *turns))
            if self.rng.random() < 0.15:
                asked, answer = texts.text_only(self.rng)
                turns = [human(asked), gpt(answer)]
                records.append({"id": f"text-{scene.seed:08d}", "conversations": turns})
        return records

    def text_only(self, count: int) -> list[dict]:
        pairs = [texts.text_only(self.rng) for _ in range(count)]
        return [
            {"id": f"text-only-{number}", "conversations": [human(asked), gpt(answer)]}
            for number, (asked, answer) in enumerate(pairs)
        ]

    def unlabelled_images(self) -> list[dict]:
        return [
            self.record("unlabelled_images", scene, human(with_image(self.rng.choice(CAPTION_QUESTIONS))))
            for scene in self.scenes["unlabelled_images"]
        ]

    def references(self) -> list[dict]:
        """What the unlabelled images show: a true description and the objects, to measure generated captions by."""
        return [
            {
                "id": f"unlabelled_images-{scene.seed:08d}",
                "captions": [texts.description(scene)],
                "objects": [thing.name for thing in scene.things],
            }
            for scene in self.scenes["unlabelled_images"]
        ]

    def unlabelled_questions(self) -> list[dict]:
        records = []
        for scene in self.scenes["unlabelled_questions"]:
            question = self.rng.choice(texts.questions(scene, self.rng))
            records.append(self.record("unlabelled_questions", scene, human(with_image(question.text))))
        return records

    def benchmarks(self) -> dict[str, list[dict]]:
        """Rows of each benchmark in VLMEvalKit's columns. A scene gives at most one row to each benchmark."""
        rows: dict[str, list[dict]] = {name: [] for name in BENCHMARKS}
        for scene in self.scenes["benchmark"]:
            image = base64.b64encode(png(scene)).decode()
            questions = {question.kind: question for question in texts.questions(scene, self.rng)}
            for name, kinds in BENCHMARKS.items():
                available = [questions[kind] for kind in kinds if kind in questions]
                if not available:
                    continue
                question = self.rng.choice(available)
                row = {
                    "index": len(rows[name]), "image": image, "question": question.text, "answer": question.answer,
                    "category": question.kind,
                }  # fmt: skip
                if name == "ToyMCQ":
                    options, letter = texts.multiple_choice(question, self.rng)
                    row.update(zip("ABCD", options, strict=False), answer=letter)
                rows[name].append(row)
        return rows


def build(folder: str | Path, seed: int = 0, scale: float = 1.0, questions: int = 120) -> Path:
    """Write the whole world below `folder`; `scale` shrinks every split, `questions` bounds each benchmark."""
    folder = Path(folder)
    world = World(folder, seed, scale)
    write_json(folder / "align.json", world.align())
    write_json(folder / "captioned.json", world.captioned())
    write_records(folder / "reasoning.jsonl", world.reasoning())
    write_json(folder / "instructions.json", world.instructions())
    write_json(folder / "unlabelled_images.json", world.unlabelled_images())
    write_json(folder / "unlabelled_questions.json", world.unlabelled_questions())
    write_records(folder / "references.jsonl", world.references())
    (folder / "benchmarks").mkdir(exist_ok=True)
    for name, rows in world.benchmarks().items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (folder / "benchmarks" / f"{name}.tsv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
            writer.writeheader()
            writer.writerows(rows[:questions])
    write_records(folder / "text_only.jsonl", world.text_only(max(int(80 * scale), 2)))
    write_records(folder / "truth.jsonl", world.truth)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of scenes")
    parser.add_argument("--questions", type=int, default=120, help="rows per benchmark at most")
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed, arguments.scale, arguments.questions)
    counts = {path.name: len(json.loads(path.read_text())) for path in sorted(arguments.output.glob("*.json"))}
    print(f"toy world in {arguments.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
