"""Benchmarks in VLMEvalKit's TSV format: answered greedily, scored by VLMEvalKit's rules.

    reads   <name>.tsv (see llava/eval/questions.py); the file's name says which rules it has (MMBench_DEV_EN, POPE, ...)
    writes  predictions/<name>.jsonl           every question with the answer, what was understood, and its mark
            vlmevalkit/<model>/<model>_<name>.xlsx   the answers in VLMEvalKit's own layout, which it can score again
            results.json                       per benchmark the number, its 95% interval, details, who judged

Several ranks share the questions; a run that was stopped goes on where it was. With --judge a language model reads the
answers that exact rules cannot; without one MMVet and MathVista get scores that are labelled as such.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.eval.answering import Answerer, LocalModel, ServedModel, answer_share, answers_below
from llava.eval.judge import Judge
from llava.eval.questions import Row, question_text, read_tsv
from llava.eval.scoring import METRICS, Rule, rule_for
from llava.records import write_json, write_records
from llava.runs import join_run, open_run, rank

KEPT = ("category", "l2-category", "split", "image_path", "g_index", "task", "skills")  # of a row, with its prediction


def score(
    name: str, rows: list[Row], answers: dict[str, str], judge: Judge | None
) -> tuple[list[dict], dict[str, Any]]:
    """Predictions with their marks, and the benchmark's result."""
    rule = rule_for(name, rows)
    answered = [(row, answers[row["index"]]) for row in rows]
    marks = [rule.mark(row, answer) for row, answer in answered]
    said_by = None
    open_ones = [n for n, (_, mark) in enumerate(marks) if rule.judge == "grade" or mark is None]
    if judge and rule.judge and open_ones:
        judged, said_by = judge.marks(name, rule, [answered[n] for n in open_ones])
        for number, mark in zip(open_ones, judged, strict=True):
            marks[number] = mark
    predictions = [
        {
            "index": row["index"], "prediction": answer, "answer": row["answer"], "extracted": extracted,
            "score": mark or 0.0, **{key: row[key] for key in KEPT if row.get(key)},
        }
        for (row, answer), (extracted, mark) in zip(answered, marks, strict=True)
    ]  # fmt: skip
    return predictions, {**result(rule, predictions), **({"judge": said_by} if said_by else {})}


def result(rule: Rule, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    from llava.eval.totals import TOTALS, interval

    units = TOTALS[rule.total](predictions)
    low, high = interval(units)
    return {
        "questions": len(predictions), "metric": METRICS[rule.total], "value": units.number(), "low": low, "high": high,
        "total": rule.total, "scored_by": rule.label, "details": units.details,
    }  # fmt: skip


def write_sheet(path: Path, rows: list[Row], answers: dict[str, str]) -> None:
    """The answers as VLMEvalKit writes them: the TSV's columns without the images, and `prediction`."""
    import openpyxl
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [column for column in rows[0] if column != "image"]
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cell(column: str, value: str) -> WriteOnlyCell:
        if column in ("index", "g_index") and value.isdigit():
            return WriteOnlyCell(sheet, int(value))
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        if value.startswith("="):
            made.data_type = "s"  # an answer, not a formula
        return made

    sheet.append([*columns, "prediction"])
    for row in rows:
        values = [cell(column, row[column]) for column in columns]
        sheet.append([*values, cell("prediction", answers[row["index"]])])
    book.save(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_name_or_path", help="checkpoint folder")
    parser.add_argument("--base_url", help="a chat-completions server instead, ending in /v1")
    parser.add_argument("--model", help="the server's name for its model")
    parser.add_argument("--data_path", required=True, help="TSV files, comma-separated, or a folder of them")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time (default: 16)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="(default: 64; more for answers in steps)")
    parser.add_argument("--judge", help="name of a language model that reads answers exact rules cannot")
    parser.add_argument("--judge_base_url", help="its server (default: OPENAI_BASE_URL)")
    parser.add_argument("--dry_run", action="store_true", help="read the questions, answer nothing")
    arguments = parser.parse_args()
    if bool(arguments.model_name_or_path) == bool(arguments.base_url):
        raise UserError("give --model_name_or_path or --base_url. Fix: MODEL_PATH=checkpoint, or BASE_URL and MODEL")
    if arguments.base_url and not arguments.model:
        raise UserError("--base_url needs --model: the name under which the server knows its model. Fix: MODEL=name")
    return arguments


def main() -> None:
    arguments = parse()
    data = Path(arguments.data_path)
    paths = sorted(data.glob("*.tsv")) if data.is_dir() else [Path(name) for name in arguments.data_path.split(",")]
    if not paths:
        raise UserError(f"{data} holds no .tsv file. Fix: set DATA_PATH to VLMEvalKit TSV files")
    if len({path.stem for path in paths}) < len(paths):
        raise UserError("two of the TSV files have the same name. Fix: name each benchmark once")
    if arguments.dry_run:
        dry_run(arguments, paths)
        return
    identity = {
        "model": arguments.model_name_or_path or f"{arguments.model} at {arguments.base_url}",
        "data": list(map(str, paths)), "max_new_tokens": arguments.max_new_tokens,
    }  # fmt: skip
    inputs = [*paths, *([arguments.model_name_or_path] if arguments.model_name_or_path else [])]
    folder = Path(arguments.output_dir)
    if rank() != 0:
        if not join_run(folder, "evaluate", identity, inputs):
            answer_all(arguments, folder, paths)
        return
    for path in paths:
        read_tsv(path, images=False)  # before anything is asked
    with open_run(folder, "evaluate", identity, inputs) as run:
        output = folder / "results.json"
        if run.complete and json.loads(output.read_text()).get("judge", "") == (arguments.judge or ""):
            print(f"[evaluate] already complete -> {output}")
            return
        if not run.complete:  # else only another judge is asked
            answer_all(arguments, folder, paths)
        name = Path(arguments.model_name_or_path or arguments.model).name
        judge = Judge(arguments.judge, arguments.judge_base_url, folder / "judge") if arguments.judge else None
        results: dict[str, dict[str, Any]] = {}
        for path in paths:
            rows = read_tsv(path, images=False)
            answers, refused = complete_answers(folder, path, rows)
            predictions, results[path.stem] = score(path.stem, rows, answers, judge)
            if refused:
                results[path.stem]["refused"] = refused
            write_records(folder / "predictions" / f"{path.stem}.jsonl", predictions)
            write_sheet(folder / "vlmevalkit" / name / f"{name}_{path.stem}.xlsx", rows, answers)
        write_json(output, {"model": identity["model"], "judge": arguments.judge or "", "benchmarks": results})
        counts = {"benchmarks": len(results), "questions": sum(result["questions"] for result in results.values())}
        refused = sum(result.get("refused", 0) for result in results.values())
        run.finish(output, **counts, **({"refused": refused} if refused else {}))


def answer_all(arguments: argparse.Namespace, folder: Path, paths: list[Path]) -> None:
    """This rank's share of every benchmark, one after the other; the model is opened when it has something to answer."""

    @cache
    def model() -> Answerer:
        if arguments.base_url:
            return ServedModel(arguments.base_url, arguments.model, arguments.batch_size, arguments.max_new_tokens)
        return LocalModel(arguments.model_name_or_path, arguments.batch_size, arguments.max_new_tokens)

    for path in paths:
        answer_share(model, path, folder / "answers" / path.stem)


def complete_answers(folder: Path, path: Path, rows: list[Row]) -> tuple[dict[str, str], int]:
    from llava.generate.job import wait_for_ranks

    answers = folder / "answers" / path.stem
    wait_for_ranks(answers, len(rows))
    found, refused = answers_below(answers)
    if missing := [row["index"] for row in rows if row["index"] not in found]:
        raise UserError(f"{len(missing)} questions of {path.stem} have no answer. Fix: run the same command again")
    return found, refused


def dry_run(arguments: argparse.Namespace, paths: list[Path]) -> None:
    if arguments.model_name_or_path:
        from llava.model.load import check_checkpoint

        check_checkpoint(arguments.model_name_or_path)
    for path in paths:
        rows = read_tsv(path, images=False)
        rule = rule_for(path.stem, rows)
        scored_by = f"judge {arguments.judge}" if arguments.judge and rule.judge else rule.label
        print(f"{path.stem:12} {len(rows):,} questions, {METRICS[rule.total]} by {scored_by}")
        print(f"             first: {question_text(rows[0], rule.short)!r}")
    print(f"writes       {arguments.output_dir}/results.json (nothing was written)")


if __name__ == "__main__":
    run_command(main)
