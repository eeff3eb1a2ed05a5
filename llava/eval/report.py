"""Results of several models as one table like a paper's: Markdown, LaTeX, spreadsheet.

python -m llava.eval.report --results base=runs/x/eval-base SICOG=runs/x/eval-sicog --output runs/x/table

reads   per model a folder of ours (training_scripts/evaluate.sh), of VLMEvalKit or of lmms-eval, the baseline first;
        --published adds the numbers of the paper: base, SICOG, LLaVA-NeXT-34B-captions, Qwen2-VL-72B-captions,
        Multi-Experts, or all; what was not published is blank
writes  <output>.md, <output>.tex, <output>.xlsx

Differences are to the first model, on the same questions: 95% interval of a paired bootstrap, and p of a permutation test
(two-sided, not corrected for the number of benchmarks). The average is over benchmarks that all evaluated models have,
MME's perception divided by 20.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llava.errors import UserError, run_command
from llava.eval.published import ORDER, PUBLISHED
from llava.eval.results import Entry, read_results
from llava.records import write_atomically

FAMILIES = {  # as papers call a benchmark -> its names in VLMEvalKit and lmms-eval, in lower case with _
    "MMBench": r"mmbench(_v11)?(_(dev|test)_en|_en_(dev|test)|_en)?(_v11)?", "MMStar": "mmstar", "MMVet": "mmvet",
    "POPE": "pope", "RealWorldQA": "realworldqa", "ScienceQA": r"scienceqa(_(img|full|val|test))?",
    "AI2D": r"ai2d(_test)?", "MathVista": r"mathvista(_(mini|testmini))?(_(cot|format|solution))?",
    "ChartQA": r"chartqa(_test)?", "DocVQA": r"docvqa(_(val|test))?", "OCRBench": "ocrbench", "MME": "mme",
    "TextVQA": r"textvqa(_val)?", "SEED": r"seedbench(_img|_image)?",
}  # fmt: skip


@dataclass
class Difference:
    """A model's number minus the baseline's, with its 95% interval and p where the questions are known."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass
class Table:
    """Columns in order, rows by benchmark; `differences` of all models but the first; `sources` of each column."""

    columns: list[str]
    rows: list[str]
    entries: dict[tuple[str, str], Entry]
    differences: dict[tuple[str, str], Difference]
    averages: dict[str, float]
    averaged: list[str]
    sources: dict[str, str]

    def compared(self) -> list[str]:
        """The columns with differences."""
        return [name for name in self.columns if any(key[1] == name for key in self.differences)]

    def best(self, row: str) -> set[str]:
        """The columns whose number is the row's highest, as it is printed."""
        printed = {
            name: round(self.entries[row, name].value, 1) for name in self.columns if (row, name) in self.entries
        }
        return (
            {name for name, value in printed.items() if value == max(printed.values())} if len(printed) > 1 else set()
        )


def family(benchmark: str) -> str:
    """MMBench_DEV_EN, mmbench_en_dev -> MMBench."""
    plain = benchmark.lower().replace("-", "_")
    return next((name for name, pattern in FAMILIES.items() if re.fullmatch(pattern, plain)), benchmark)


def build(models: dict[str, str | Path], published: list[str]) -> Table:
    """Read all folders. Raises UserError for a folder without results, and for questions that differ between models."""
    found = {name: read_results(folder) for name, folder in models.items()}
    rows = list(dict.fromkeys(benchmark for entries in found.values() for benchmark in entries))
    if published:
        rows += [name for name in ORDER if name not in map(family, rows)]
    rows.sort(key=lambda row: ORDER.index(family(row)) if family(row) in ORDER else len(ORDER))
    entries = {(row, name): found[name][row] for name in found for row in rows if row in found[name]}
    sources = {name: str(folder) for name, folder in models.items()}
    families = Counter(map(family, rows))
    for name in published:
        source, values = PUBLISHED[name]
        sources[f"{name} (paper)"] = f"arXiv 2503.12303, {source}"
        for row in rows:
            if families[family(row)] == 1 and family(row) in values:
                entries[row, f"{name} (paper)"] = Entry(values[family(row)], source)
    columns = [*found, *(f"{name} (paper)" for name in published)]
    differences = {
        (row, name): difference(row, entries[row, columns[0]], entries[row, name])
        for name in list(found)[1:]
        for row in rows
        if (row, name) in entries and (row, columns[0]) in entries
    }
    averaged = [row for row in rows if all((row, name) in entries for name in found)]
    averages = {
        name: sum(entries[row, name].value / (20 if family(row) == "MME" else 1) for row in averaged) / len(averaged)
        for name in columns
        if averaged and all((row, name) in entries for row in averaged)
    }
    return Table(columns, rows, entries, differences, averages, averaged, sources)


def difference(row: str, first: Entry, second: Entry) -> Difference:
    from llava.eval.totals import compare

    if first.units is None or second.units is None:
        return Difference(second.value - first.value)
    if set(first.units.names) != set(second.units.names):
        raise UserError(f"{row}: the models answered different questions. Fix: evaluate both on the same file")
    value, (low, high), p = compare(first.units, second.units.in_order(first.units.names))
    return Difference(value, low, high, p)


def cells(table: Table) -> list[list[str]]:
    """Header and rows as text; the best of a row between asterisks."""
    header = ["benchmark", "n", *table.columns]
    for name in table.compared():
        header += [f"{name} - {table.columns[0]}", "p"]
    rows = [header]
    for row in table.rows:
        best = table.best(row)
        known = [table.entries[row, name] for name in table.columns if (row, name) in table.entries]
        count = next((entry.questions for entry in known if entry.questions), None)
        line = [row, f"{count:,}" if count else ""]
        for name in table.columns:
            text = shown(table.entries.get((row, name)))
            line.append(f"**{text}**" if name in best else text)
        for name in table.compared():
            line += shown_difference(table.differences.get((row, name)))
        rows.append(line)
    if table.averages:
        line = ["average", f"of {len(table.averaged)}"]
        line += [f"{table.averages[name]:.1f}" if name in table.averages else "" for name in table.columns]
        for name in table.compared():
            line += [f"{table.averages[name] - table.averages[table.columns[0]]:+.1f}", ""]
        rows.append(line)
    return rows


def shown(entry: Entry | None) -> str:
    if entry is None:
        return ""
    bounds = f" ({entry.low:.1f} to {entry.high:.1f})" if entry.low is not None else ""
    return f"{entry.value:.1f}{bounds}"


def shown_difference(found: Difference | None) -> list[str]:
    if found is None:
        return ["", ""]
    if found.p is None:
        return [f"{found.value:+.1f}", ""]
    return [
        f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})",
        f"{found.p:.3f}" if found.p >= 0.001 else "<0.001",
    ]


def notes(table: Table) -> list[str]:
    """What a reader has to know: what stands beside a number, where columns come from, what is counted, who judged."""
    lines = [
        "in brackets: 95% interval; p: permutation test on the same questions, two-sided, not corrected for several"
    ]
    lines += [f"{name}: {source}" for name, source in table.sources.items()]
    counted: dict[str, list[str]] = {}
    for row in table.rows:
        own = [
            table.entries[row, name] for name in table.columns
            if (row, name) in table.entries and not name.endswith(" (paper)")
        ]  # fmt: skip
        metric = next((entry.metric for entry in own if entry.metric), "as published")
        said = ", ".join(sorted({entry.source for entry in own})) or "published only"
        counted.setdefault(f"{metric}; {said}", []).append(row)
    return lines + [f"{', '.join(rows)}: {what}" for what, rows in counted.items()]


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A booktabs table: numbers, best bold, the difference to the first model small beside it."""
    escape = str.maketrans({"_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#"})
    lines = [
        r"\begin{tabular}{l" + "r" * len(table.columns) + "}", r"\toprule",
        " & ".join(name.translate(escape) for name in ["benchmark", *table.columns]) + r" \\", r"\midrule",
    ]  # fmt: skip
    for row in table.rows:
        best, line = table.best(row), [row.translate(escape)]
        for name in table.columns:
            entry = table.entries.get((row, name))
            text = f"{entry.value:.1f}" if entry else ""
            text = rf"\textbf{{{text}}}" if name in best else text
            change = table.differences.get((row, name))
            line.append(text + (rf"\,{{\scriptsize ({change.value:+.1f})}}" if change else ""))
        lines.append(" & ".join(line) + r" \\")
    if table.averages:
        values = [f"{table.averages[name]:.1f}" if name in table.averages else "" for name in table.columns]
        lines += [r"\midrule", " & ".join(["average", *values]) + r" \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", nargs="+", required=True, metavar="NAME=FOLDER", help="the baseline first")
    parser.add_argument("--published", nargs="*", default=[], metavar="NAME", help="columns of the paper, or all")
    parser.add_argument("--output", required=True, help="path without ending")
    arguments = parser.parse_args()
    models: dict[str, str | Path] = {}
    for item in arguments.results:
        name, equals, folder = item.partition("=")
        if not equals:
            raise UserError(f"--results wants NAME=FOLDER, not {item!r}")
        if name in models:
            raise UserError(f"--results names {name!r} twice. Fix: give every model a name of its own")
        models[name] = Path(folder)
    published = list(PUBLISHED) if arguments.published == ["all"] else arguments.published
    if unknown := [name for name in published if name not in PUBLISHED]:
        raise UserError(f"--published {unknown[0]!r} is not known. Fix: one of {', '.join(PUBLISHED)}, or all")
    from llava.eval.workbook import write_workbook

    table = build(models, published)
    text = markdown(cells(table))
    write_atomically(f"{arguments.output}.md", [text, "\n", *(f"* {line}\n" for line in notes(table))])
    write_atomically(f"{arguments.output}.tex", [latex(table)])
    write_workbook(table, Path(f"{arguments.output}.xlsx"))
    print(text, end="")


if __name__ == "__main__":
    run_command(main)
