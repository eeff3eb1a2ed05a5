"""Results of several models as one table: Markdown and spreadsheet, with sample counts and 95% intervals.

python -m llava.eval.report --results base=runs/x/eval-base SICOG=runs/x/eval-sicog --output runs/x/table

reads   results.json and predictions/ of `llava.eval.benchmarks`
writes  <output>.md, <output>.xlsx
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.records import read_jsonl, write_atomically

Results = dict[str, dict[str, Any]]


def load_results(folder: str | Path) -> Results:
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist. Fix: run training_scripts/evaluate.sh for this model first")
    return json.loads(path.read_text())["benchmarks"]


def paired_difference(first: Path, second: Path) -> tuple[float, float]:
    """Accuracy of `second` minus `first` on the same questions, and half its 95% interval (normal, paired).

    Raises UserError when the two files answer different questions.
    """
    a = {row["index"]: row["correct"] for row in read_jsonl(first)}
    b = {row["index"]: row["correct"] for row in read_jsonl(second)}
    if not a:
        raise UserError(f"{first} holds no predictions. Fix: evaluate this model again")
    if a.keys() != b.keys():
        raise UserError(f"{first} and {second} answer different questions; evaluate both on the same TSV")
    differences = [b[index] - a[index] for index in a]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / max(count - 1, 1)
    return mean, 1.959964 * math.sqrt(variance / count)


def table(models: dict[str, Path]) -> list[list[str]]:
    """Header and rows; the last column compares the last model with the first on the same questions."""
    results = {name: load_results(folder) for name, folder in models.items()}
    names = list(models)
    benchmarks = list(results[names[0]])
    for name in names:
        if list(results[name]) != benchmarks:
            raise UserError(f"{name} was evaluated on {', '.join(results[name])}, not {', '.join(benchmarks)}")
    compare = len(names) > 1
    header = ["benchmark", "n", *(f"{name} (95% interval)" for name in names)]
    rows = [header + ([f"{names[-1]} - {names[0]}"] if compare else [])]
    for benchmark in benchmarks:
        row = [benchmark, str(results[names[0]][benchmark]["questions"])]
        for name in names:
            result = results[name][benchmark]
            row.append(f"{result['accuracy']:.1%} ({result['low']:.1%} to {result['high']:.1%})")
        if compare:
            files = [Path(models[name]) / "predictions" / f"{benchmark}.jsonl" for name in (names[0], names[-1])]
            mean, half = paired_difference(*files)
            row.append(f"{100 * mean:+.1f} ± {100 * half:.1f}")
        rows.append(row)
    means = [sum(results[name][b]["accuracy"] for b in benchmarks) / len(benchmarks) for name in names]
    average = ["average", "", *(f"{mean:.1%}" for mean in means)]
    rows.append(average + ([f"{100 * (means[-1] - means[0]):+.1f}"] if compare else []))
    return rows


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def spreadsheet(rows: list[list[str]], path: Path) -> None:
    import openpyxl
    from openpyxl.styles import Font

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "results"
    for row in rows:
        sheet.append(row)
    for cell in sheet[1]:
        cell.font = Font(bold=True)
    for column, cells in zip("ABCDEFGH", zip(*rows, strict=True), strict=False):
        sheet.column_dimensions[column].width = max(map(len, cells)) + 2
    book.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", required=True, metavar="NAME=FOLDER", help="the baseline first")
    parser.add_argument("--output", required=True, help="path without ending")
    arguments = parser.parse_args()
    models = {}
    for item in arguments.results:
        name, equals, folder = item.partition("=")
        if not equals:
            raise UserError(f"--results wants NAME=FOLDER, not {item!r}")
        models[name] = Path(folder)
    rows = table(models)
    text = markdown(rows)
    write_atomically(f"{arguments.output}.md", [text])
    spreadsheet(rows, Path(f"{arguments.output}.xlsx"))
    print(text, end="")


if __name__ == "__main__":
    run_command(main)
