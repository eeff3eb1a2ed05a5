"""Results of one model from a folder: ours, VLMEvalKit's, or lmms-eval's.

    ours          results.json and predictions/ of `llava.eval.benchmarks`
    VLMEvalKit    <work-dir>/<model>: <model>_<benchmark>_acc.csv, _score.csv, _score.json, and its prediction sheets
    lmms-eval     <output_path>: the newest *_results.json

VLMEvalKit gives no intervals: its prediction sheets are marked again by our rules, and where that gives its own number,
they give intervals and paired tests too.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError
from llava.records import read_jsonl

if TYPE_CHECKING:
    from llava.eval.totals import Units


@dataclass
class Entry:
    """A model's number on a benchmark, in the benchmark's points (most: per cent)."""

    value: float
    source: str
    questions: int | None = None
    low: float | None = None
    high: float | None = None
    metric: str = ""
    units: "Units | None" = None
    details: dict[str, float] = field(default_factory=dict)


def read_results(folder: str | Path) -> dict[str, Entry]:
    """benchmark -> entry. Raises UserError when the folder holds no results that are known."""
    folder = Path(folder)
    if (folder / "results.json").is_file():
        return ours(folder)
    if folder.is_dir():
        if found := sorted(folder.rglob("*_results.json"), key=lambda path: path.name):
            return lmms(found[-1])
        if entries := vlmevalkit(folder):
            return entries
    raise UserError(
        f"{folder} holds no results: neither results.json of ours, nor *_acc.csv of VLMEvalKit, nor *_results.json of "
        "lmms-eval. Fix: run training_scripts/evaluate.sh for this model first"
    )


def ours(folder: Path) -> dict[str, Entry]:
    from llava.eval.totals import TOTALS

    entries = {}
    for name, found in json.loads((folder / "results.json").read_text())["benchmarks"].items():
        predictions = list(read_jsonl(folder / "predictions" / f"{name}.jsonl"))
        if not predictions:
            raise UserError(f"{folder}/predictions/{name}.jsonl holds no predictions. Fix: evaluate this model again")
        judge = found.get("judge")
        said_by = f"judge {judge['model']}, {judge['date']}" if judge else found["scored_by"]
        entries[name] = Entry(
            found["value"], said_by, found["questions"], found["low"], found["high"], found["metric"],
            TOTALS[found["total"]](predictions), found["details"],
        )  # fmt: skip
    return entries


def vlmevalkit(folder: Path) -> dict[str, Entry]:
    entries = {}
    endings = ("_acc.csv", "_score.csv", "_score.json")
    for path in sorted(path for ending in endings for path in folder.rglob(f"*{ending}")):
        name = benchmark_of(path.name.rsplit("_", 1)[0], path)
        judge = ""
        sheets = [sheet for sheet in path.parent.glob("*.xlsx") if path.name.startswith(sheet.stem + "_")]
        if sheets:
            sheet = min(sheets, key=lambda item: len(item.name))
            judge = name[len(benchmark_of(sheet.stem, sheet)) :].strip("_")
            name = benchmark_of(sheet.stem, sheet)
        number = headline(path)
        if number is None:
            continue
        entry = Entry(number, f"VLMEvalKit, judge {judge}" if judge else "VLMEvalKit")
        if sheets:
            add_units(entry, name, sheet)
        entries[name] = entry
    return entries


def benchmark_of(stem: str, path: Path) -> str:
    """What follows the model's name in a file's name; the model names one of the folders around it."""
    for parent in path.resolve().parents:
        if stem.startswith(parent.name + "_"):
            return stem[len(parent.name) + 1 :]
    raise UserError(f"{path}: no folder around it has the model's name. Fix: give VLMEvalKit's <work-dir>/<model>")


def headline(path: Path) -> float | None:
    """The number VLMEvalKit calls the result: F1 for POPE, perception for MME, CIDEr for captions, else accuracy."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        return next((float(found[key]) for key in ("Final Score Norm", "CIDEr") if key in found), None)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    for title in ("Category", "Task&Skill"):  # a judge's: one row each
        if title in rows[0]:
            return next((float(row["acc"]) for row in rows if row[title] == "Overall"), None)
    for key in ("perception", "Overall"):
        if key in rows[0]:
            share = "split" in rows[0] and "precision" not in rows[0]  # multiple choice: 0 to 1
            return float(rows[0][key]) * (100 if share else 1)
    return None


def add_units(entry: Entry, name: str, sheet: Path) -> None:
    """Mark the sheet's predictions; where that gives VLMEvalKit's own number, add interval and units."""
    from llava.eval.benchmarks import score
    from llava.eval.totals import TOTALS, interval

    rows = list(sheet_rows(sheet))
    if not rows or not {"index", "prediction", "answer"} <= rows[0].keys():
        return
    predictions, found = score(name, rows, {row["index"]: row["prediction"] for row in rows}, None)
    entry.questions, entry.metric = len(rows), found["metric"]
    if abs(found["value"] - entry.value) < 0.01:
        entry.units, entry.details = TOTALS[found["total"]](predictions), found["details"]
        entry.low, entry.high = interval(entry.units)


def sheet_rows(path: Path) -> Iterator[dict[str, str]]:
    import openpyxl

    book = openpyxl.load_workbook(path, read_only=True)
    lines = book.worksheets[0].iter_rows(values_only=True)
    header = [str(title) for title in next(lines, ())]
    for line in lines:
        yield {title: "" if value is None else str(value) for title, value in zip(header, line, strict=True)}
    book.close()


def lmms(path: Path) -> dict[str, Entry]:
    found: dict[str, Any] = json.loads(path.read_text())
    entries = {}
    for task, numbers in found.get("results", {}).items():
        named = {
            key.split(",")[0]: value for key, value in numbers.items()
            if isinstance(value, int | float) and not key.split(",")[0].endswith("_stderr")
        }  # fmt: skip
        metric = next((key for part in LMMS_METRICS for key in named if part in key), next(iter(named), None))
        if metric is None:
            continue  # a group without a number of its own
        value = float(named[metric])
        scale = 100 if 0 <= value <= 1 else 1
        error = next(
            (
                error
                for key, error in numbers.items()
                if key.startswith(f"{metric}_stderr") and isinstance(error, float)
            ),
            None,
        )
        half = 1.959964 * scale * error if error is not None else None
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        entries[task] = Entry(
            scale * value, "lmms-eval", count, None if half is None else scale * value - half,
            None if half is None else scale * value + half, metric,
        )  # fmt: skip
    return entries


LMMS_METRICS = ("perception_score", "f1_score", "relaxed_overall", "anls", "gpt_eval_score", "accuracy", "exact_match")
