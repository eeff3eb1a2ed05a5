"""The whole history of one record on the terminal: source, image, who wrote it and how, scores, decision, runs.

reads   --work_dir: every *.jsonl and run.json below a run of run_sicog.sh, and the record files those runs read;
        --records: the given files, and what the runs that wrote them read
writes  nothing

An id names everything that became of it: of a source record also the training records made from it (`ID-cod`), of a
training record also its source. An id that occurs in several sources shows them all, oldest first.
"""

import argparse
import signal
import time
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.images import ImageError, find_image, image_size
from llava.records import Record, images_of, sha256_of
from quality_evaluation.lineage import (
    SIDES,
    Files,
    Found,
    Run,
    close_ids,
    files_of_work,
    is_output,
    locate,
    name_of,
    read_run,
    search,
)


def printable(text: str) -> str:
    """Control characters, which could steer the terminal, as escapes."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def indent(text: str, by: int) -> str:
    return "\n".join(" " * by + line if line else "" for line in text.strip().split("\n"))


def fields(values: dict[str, Any]) -> str:
    """`name value` of what is set, dictionaries inside included."""
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            parts.append(fields(value))
        elif value is not None and value is not False and value != "" and value != []:
            parts.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return ", ".join(part for part in parts if part)


def line_of(run: Run) -> str:
    """Stage, status, when, how long, commit."""
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run["started"]))
    return f"{run['stage']}, {run['status']}, {started}, {run['seconds']:.0f} s, commit {run['commit']}"


def about_run(run: Run) -> list[str]:
    """The run, what it read with the hashes it recorded, who made the model, and the arguments that are no paths."""
    inputs = run["inputs"]
    lines = [f"run       {run['folder'] / 'run.json'}: {line_of(run)}"]
    lines += [f"  read    {name} ({digest})" for name, digest in inputs.items()]
    for name in inputs:
        made = read_run(locate(name) / "run.json")
        if made:
            lines.append(f"  model   {name}: {line_of(made)}; it read {', '.join(made['inputs'])}")
    plain = {
        key: value
        for key, value in run["arguments"].items()
        if not is_output(key) and key != "image_folder" and not inputs.keys() & set(map(str, as_list(value)))
    }
    return [*lines, f"  with    {fields(plain)}"] if fields(plain) else lines


def as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list) else [value]


def about_candidate(candidate: dict[str, Any] | str) -> str:
    """Who wrote it, what was asked, how it was drawn and how it ended, then the whole text."""
    if isinstance(candidate, str):
        return indent(candidate, 8)
    rest = {key: value for key, value in candidate.items() if key not in ("text", "score")}
    lines = []
    for title, key, more in (
        ("model", "model", "model_hash"),
        ("asked", "instruction", "style"),
        ("ended", "finish_reason", "tokens"),
        ("from", "file", None),
    ):
        if key in rest:
            value, note = rest.pop(key), rest.pop(more, None)
            lines.append(f"{title:<7} {value}" + (f" ({note}{' tokens' * (more == 'tokens')})" if note else ""))
    drawn = ", ".join(f"{name} {'none' if value is None else value}" for name, value in rest.items())
    lines += [f"drawn   {drawn}"] if drawn else []
    return "\n".join([*(f"    {line}" for line in lines), indent(candidate["text"], 8)])


def text_of(candidate: dict[str, Any] | str) -> str:
    return candidate if isinstance(candidate, str) else candidate["text"]


def about_decision(decision: dict[str, Any]) -> str:
    """Kept or dropped, and why."""
    known = {"kept", "score", "threshold", "chosen", "rejected"}
    verdict, compared = ("kept", "reaches") if decision["kept"] else ("dropped", "is below")
    loser = "none" if decision["rejected"] is None else f"candidate {decision['rejected']}"
    more = fields({key: value for key, value in decision.items() if key not in known})
    return (
        f"{verdict}: the best score {decision['score']} {compared} the threshold {decision['threshold']}; "
        f"chosen: candidate {decision['chosen']}, rejected: {loser}" + (f"; {more}" if more else "")
    )


def about_row(found: Found, judged: set[str]) -> str:
    """What this file says about the record. `judged`: texts that are shown with their scores elsewhere."""
    row, lines = found.row, []
    if found.kind == "rejected":
        lines = [f"  refused: {row['reason']}"]
        lines += ["  the reply:", indent(row["reply"], 8)] if row.get("reply") else []
    elif found.kind == "reply":
        usage = fields({key: value for key, value in row.items() if key not in ("id", "steps")})
        lines = [f"  answered in {len(row['steps'])} steps; {usage}"]
    elif found.kind == "generated":
        others = [item for item in row["candidates"] if text_of(item) not in judged]
        count = len(row["candidates"])
        lines = [f"  candidates: {count}, of which {count - len(others)} were judged and are shown there"]
        for item in others:
            lines += ["  not judged:", about_candidate(item)]
    elif found.kind == "judged":
        decision = row["decision"]
        roles = {decision["rejected"]: ", rejected", decision["chosen"]: ", chosen"}
        lines = [f"  {about_decision(decision)}"]
        for number, item in enumerate(row["candidates"]):
            lines += [f"  candidate {number}: score {item.get('score')}{roles.get(number, '')}", about_candidate(item)]
    elif found.kind == "chosen":
        candidate, decision = row["lineage"]["candidate"], row["lineage"]["decision"]
        lines = [f"  a training record: the whole of candidate {decision['chosen']}"]
        if candidate["text"] not in judged:
            lines += [f"  {about_decision(decision)}", about_candidate(candidate)]
    elif found.kind == "pair":
        lines = about_pair(row, judged)
    else:
        lines = [f"  {fields(row['lineage'])}"] if found.kind == "annotated" else []
        lines += conversation(row)
    return "\n".join(lines)


def about_pair(row: Record, judged: set[str]) -> list[str]:
    """Where the pair is from and who wrote its sides, with the texts that are shown nowhere else."""
    lineage = row.get("lineage")
    if not isinstance(lineage, dict) or lineage.get("stage") != "pairs":
        return [f"  a preference pair; {fields({'scores': row.get('scores')})}"]
    lines = [f"  a preference pair, {row['source']}, of {lineage['source']} in {lineage['file']}"]
    for side in SIDES:
        lines += [f"  {side}: {fields(lineage[side])}"]
        lines += [indent(row[side], 8)] if row[side] not in judged else []
    return lines


def conversation(row: Record) -> list[str]:
    lines = []
    for turn in row.get("conversations", []):
        lines += [f"  {turn.get('from', turn.get('role'))}:", indent(turn.get("value", turn.get("content")), 8)]
    return lines


def about_images(found: list[Found], folder: str | None) -> list[str]:
    """Path, size and sha256 of every image of the record."""
    roots = [folder] if folder else []
    for item in found:
        roots += [item.run["arguments"].get("image_folder")] if item.run else [str(item.path.parent)]
    lines = []
    for name in dict.fromkeys(name for item in found for name in images_of(item.row)):
        problem = "no run says where it lies"
        for root in dict.fromkeys(filter(None, roots)):
            try:
                path = find_image(locate(root), name)
                width, height = image_size(path)
                lines.append(f"image     {path}, {width} x {height}, sha256 {sha256_of(path)}")
                break
            except ImageError as error:
                problem = str(error)
        else:
            lines.append(f"image     {name}: not found, {problem}. Fix: --image_folder")
    return lines


def about_training(found: list[Found], runs: list[Run]) -> list[str]:
    """Training runs that read a file with the record in it."""
    lines = []
    for run in sorted(runs, key=lambda run: run["started"]):
        read = {locate(name).resolve() for name in run["inputs"]}
        files = dict.fromkeys(str(item.path) for item in found if item.path.resolve() in read)
        if run["stage"].startswith("train") and files:
            start = run["arguments"].get("model_name_or_path")
            lines.append(f"trained   {run['folder']} from {start} on {', '.join(files)}: {line_of(run)}")
    return lines or ["trained   by no run that is known here"]


def history(files: Files, identifier: str, folder: str | None = None) -> str:
    """Everything about the id as text. Raises UserError for an unknown id, naming close ones."""
    found = search(files, identifier)
    if not found:
        close = close_ids(files, identifier)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise UserError(
            f"no record with id {identifier!r} in {len(files.paths)} files{hint}. "
            "Fix: check the id, or name the files with --records"
        )
    places = dict.fromkeys(str(item.path) for item in found)
    lines = [f"{identifier} in {len(places)} files", *(f"          {place}" for place in places)]
    sources = dict.fromkeys(str(item.path) for item in found if item.kind == "source")
    if len(sources) > 1:
        lines.append(f"careful   the id is in {len(sources)} sources, all shown: {', '.join(sources)}")
    lines += about_images(found, folder)
    judged = {text_of(item) for each in found if each.kind == "judged" for item in each.row["candidates"]}
    run, row = None, None
    for item in found:
        lines.append("")
        if item.run and item.run != run:
            lines += about_run(item.run)
        lines.append(f"{item.kind:<9} {item.path}: {name_of(item.row)}")
        lines.append("  the same row" if item.row == row else about_row(item, judged))
        run, row = item.run, item.row
    lines += ["", *about_training(found, files.runs)]
    lines += [f"missing   {name}: a run read it, it is no longer here" for name in files.missing]
    return printable("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("id", help="id of a record")
    parser.add_argument("--work_dir", default="runs/quickstart", help="run_sicog.sh run (default: runs/quickstart)")
    parser.add_argument("--records", nargs="+", help="instead: record files (.json, .jsonl)")
    parser.add_argument("--image_folder", help="root of the image paths, where no run.json says it")
    arguments = parser.parse_args()
    files = Files(list(map(Path, arguments.records))) if arguments.records else files_of_work(Path(arguments.work_dir))
    print(history(files, arguments.id, arguments.image_folder))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    run_command(main)
