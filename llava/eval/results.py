"""Results of one model from a folder: ours, VLMEvalKit's, or lmms-eval's.

    ours          results.json and predictions/ of `llava.eval.benchmarks`
    VLMEvalKit    <work-dir>/<model>: <model>_<benchmark>_acc.csv, _score.csv, _score.json, and its prediction sheets
    lmms-eval     <output_path>: *_results.json, of a task that was run twice the newest

VLMEvalKit gives no intervals: its prediction sheets are marked again by our rules, and where that gives its own number,
they give intervals and paired tests too.
"""

import csv
import json
import sys
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
    """benchmark -> entry. Raises UserError when the folder holds no results that are known, or those of several models."""
    folder = Path(folder)
    if (folder / "results.json").is_file():
        return ours(folder)
    entries = lmms(folder) or vlmevalkit(folder)
    if not entries:
        raise UserError(
            f"{folder} holds no results: neither results.json of ours, nor *_acc.csv of VLMEvalKit, nor *_results.json "
            "of lmms-eval. Fix: run training_scripts/evaluate.sh for this model first"
        )
    return entries


def ours(folder: Path) -> dict[str, Entry]:
    from llava.eval.totals import TOTALS

    entries = {}
    for name, found in json.loads((folder / "results.json").read_text())["benchmarks"].items():
        predictions = list(read_jsonl(folder / "predictions" / f"{name}.jsonl"))
        if not predictions:
            raise UserError(f"{folder}/predictions/{name}.jsonl holds no predictions. Fix: evaluate this model again")
        judge = found.get("judge")
        said_by = f"judge {judge['model']}, {judge['date']}" if judge else found["scored_by"]
        if refused := found.get("refused"):
            said_by += f" ({refused} of {found['questions']} refused by the server)"
        entries[name] = Entry(
            found["value"], said_by, found["questions"], found["low"], found["high"], found["metric"],
            TOTALS[found["total"]](predictions), found["details"],
        )  # fmt: skip
    return entries


def vlmevalkit(folder: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    found_in: dict[str, Path] = {}
    models = set()
    for path in sorted(
        path for ending in ("_acc.csv", "_score.csv", "_score.json") for path in folder.rglob(f"*{ending}")
    ):
        model, stem = model_of(path)
        models.add(model)
        one_model(folder, models)
        sheet = prediction_sheet(path)
        name = model_of(sheet)[1] if sheet else stem.rsplit("_", 1)[0]
        judge = stem.rsplit("_", 1)[0][len(name) :].strip("_")
        number = headline(path)
        if number is None:
            print(f"not read: {path} has no number that is known as the result", file=sys.stderr)
            continue
        if name in found_in:
            raise UserError(f"{path} and {found_in[name]} are both results of {name}. Fix: name the folder of one run")
        found_in[name] = path
        entries[name] = Entry(number, f"VLMEvalKit, judge {judge}" if judge else "VLMEvalKit")
        if sheet:
            add_units(entries[name], name, sheet)
    return entries


def model_of(path: Path) -> tuple[Path, str]:
    """The model's folder, one of those around the file, and what follows its name in the file's name."""
    for parent in path.resolve().parents:
        if path.name.startswith(parent.name + "_"):
            return parent, path.stem[len(parent.name) + 1 :]
    raise UserError(f"{path}: no folder around it has the model's name. Fix: give VLMEvalKit's <work-dir>/<model>")


def one_model(folder: Path, models: set[Path]) -> None:
    if len(models) > 1:
        names = ", ".join(sorted(path.name for path in models))
        raise UserError(f"{folder} holds results of several models: {names}. Fix: name one model's folder")


def prediction_sheet(path: Path) -> Path | None:
    """The sheet of answers that a score file beside it belongs to: <sheet>_acc.csv, or <sheet>_<judge>_score.csv."""
    beside = [sheet for sheet in path.parent.glob("*.xlsx") if path.name.startswith(f"{sheet.stem}_")]
    plain = [sheet for sheet in beside if JUDGED.isdisjoint(next(sheet_rows(sheet), {}))]
    return max(plain, key=lambda sheet: len(sheet.name), default=None)


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


def lmms(folder: Path) -> dict[str, Entry]:
    """The tasks of all result files below; of a task that was run twice, the newest."""
    entries: dict[str, Entry] = {}
    models = set()
    for path in sorted(folder.rglob("*_results.json"), key=lambda path: path.name):
        try:
            found = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
            continue  # VLMEvalKit has files of this name too
        models.add(path.parent)
        for task, numbers in found["results"].items():
            count = found.get("n-samples", {}).get(task, {}).get("effective")
            for name, entry in task_entries(task, numbers, count):
                entries[name] = entry
    one_model(folder, models)
    return entries


def task_entries(task: str, numbers: dict[str, Any], count: int | None) -> Iterator[tuple[str, Entry]]:
    """The task's known number; of a task that is not known all its numbers, as they are, under names of their own."""
    named = {
        key.split(",")[0]: float(value) for key, value in numbers.items()
        if isinstance(value, int | float) and not key.split(",")[0].endswith("_stderr")
    }  # fmt: skip
    errors = {key.split(",")[0]: value for key, value in numbers.items() if isinstance(value, float)}
    known = next(
        ((metric, scale) for start, metric, scale in LMMS_METRICS if task.startswith(start) and metric in named), None
    )
    chosen = [known] if known else [(metric, 1) for metric in named]
    for metric, scale in chosen:
        value, error = scale * named[metric], errors.get(f"{metric}_stderr")
        low, high = (
            (None, None) if error is None else (value - 1.959964 * scale * error, value + 1.959964 * scale * error)
        )
        name = task if known or len(named) == 1 else f"{task}: {metric}"
        yield name, Entry(value, "lmms-eval" if known else "lmms-eval, as it is", count, low, high, metric)


JUDGED = {"hit", "log", "score", "res", "extracted", "verifier_score"}  # columns of VLMEvalKit's sheets after judging
LMMS_METRICS = (  # how a task's name begins, the number that papers quote, and what makes it points
    ("mmstar", "average", 100), ("mmbench", "gpt_eval_score", 1), ("mmvet", "gpt_eval_score", 1),
    ("mme", "mme_perception_score", 1), ("pope", "pope_f1_score", 100), ("realworldqa", "exact_match", 100),
    ("scienceqa", "exact_match", 100), ("ai2d", "exact_match", 100), ("mathvista", "llm_as_judge_eval", 1),
    ("mathvista", "gpt_eval_score", 1), ("chartqa", "relaxed_overall", 100), ("docvqa", "anls", 100),
    ("infovqa", "anls", 100), ("ocrbench", "ocrbench_accuracy", 100), ("textvqa", "exact_match", 100),
    ("seedbench", "seed_image", 100), ("seedbench", "seed_all", 100), ("coco", "coco_CIDEr", 100),
)  # fmt: skip
