"""Where the rows of one id lie: record files, the run.json behind them, and what those runs read. Used by trace.py.

Files are streamed: a .jsonl line is parsed only where the id can occur in it, a .json list a block at a time.
"""

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.records import Record, fail

ROOT = Path(__file__).resolve().parent.parent  # run.json names files as seen from here
NO_RECORDS = {"log.jsonl"}  # training's log
NO_FOLDERS = {"shards", "predictions", "answers", "judge", "reference"}  # parts of merged files, and of evaluations
KINDS = ("source", "reply", "rejected", "annotated", "generated", "judged", "chosen", "pair")  # as the stages go
SIDES = ("chosen", "rejected")  # of a preference pair
BLOCK = 1 << 20  # characters of a .json list read at a time
BETWEEN = re.compile(r"[\s,]*")  # what stands between the items of a list
Run = dict[str, Any]


@dataclass
class Found:
    """A row that belongs to the history, the file that holds it and the run that wrote the file, if one did."""

    path: Path
    row: Record
    run: Run | None

    @property
    def kind(self) -> str:
        """Which stage left this row, by what it holds."""
        lineage = self.row.get("lineage")
        stage = lineage.get("stage") if isinstance(lineage, dict) else None
        for kind, holds in (
            ("rejected", "reason" in self.row and "conversations" not in self.row),
            ("reply", "steps" in self.row and "conversations" not in self.row),
            ("judged", "decision" in self.row),
            ("generated", "candidates" in self.row),
            ("pair", "chosen" in self.row and "rejected" in self.row),
            ("chosen", stage == "curate"),
            ("annotated", stage is not None),
        ):
            if holds:
                return kind
        return "source"

    def order(self) -> tuple[float, int, str]:
        """Oldest run first; what no run wrote is the beginning. Within a run as the stages go."""
        return (self.run["started"] if self.run else 0.0, KINDS.index(self.kind), str(self.path))


def locate(name: str) -> Path:
    """A path that a run.json names: as seen from here, else from the checkout."""
    path = Path(name)
    return path if path.exists() or path.is_absolute() else ROOT / path


def read_run(path: Path) -> Run | None:
    """A run.json with the folder it lies in; None for a file that is none of ours."""
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(state, dict) and {"stage", "arguments", "inputs", "started"} <= state.keys()
    return {**state, "folder": path.parent} if ours else None


def is_output(argument: str) -> bool:
    return argument.startswith("output_")


@dataclass
class Files:
    """Record files to search, grown by what the runs behind them read; and these runs."""

    paths: list[Path]
    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Add what the runs read, what the runs that wrote that read, and so on."""
        queue = [*self.paths, *(path for run in self.runs for path in self.inputs(run))]
        found: dict[Path, Path] = {}
        for path in queue:  # grows
            if path.resolve() not in found:
                found[path.resolve()] = path
                run = self.writer(path)
                queue += self.inputs(run) if run else []
        self.paths = list(found.values())

    def inputs(self, run: Run) -> list[Path]:
        """The record files that a run read and that are still there; the others are `missing`."""
        names = [name for name in run["inputs"] if name.endswith((".json", ".jsonl"))]
        here = [locate(name) for name in names if locate(name).is_file()]
        self.missing += [name for name in names if not locate(name).is_file() and name not in self.missing]
        return here

    def writer(self, path: Path) -> Run | None:
        """The run of the file's folder, or one nearby that names this folder as another of its outputs."""
        for run in self.runs:
            if run["folder"].resolve() == path.resolve().parent:
                return run
        for place in (path.parent / "run.json", *sorted(path.parent.parent.glob("*/run.json"))):
            run = read_run(place)
            if run is None:
                continue
            outputs = [locate(str(value)).resolve() for key, value in run["arguments"].items() if is_output(key)]
            if place.parent == path.parent or path.resolve().parent in outputs:
                if all(known["folder"].resolve() != place.resolve().parent for known in self.runs):
                    self.runs.append(run)
                return run
        return None


def files_of_work(work: Path) -> Files:
    """Everything that a run of the cycle wrote and read."""
    if not work.is_dir():
        raise UserError(f"{work} is no folder. Fix: --work_dir FOLDER of a run_sicog.sh run, or --records FILE")
    paths = [
        path
        for path in sorted(work.rglob("*.jsonl"))
        if path.name not in NO_RECORDS and not NO_FOLDERS & {path.parent.name, path.parent.parent.name}
    ]
    return Files(paths, [run for path in sorted(work.rglob("run.json")) if (run := read_run(path))])


def rows_of(path: Path, part: str = "") -> Iterator[Record]:
    """The objects of a .json list or .jsonl file, one at a time; of .jsonl only lines that can hold the text `part`."""
    if not path.is_file():
        raise UserError(f"{path} is no file. Fix: give files of records")
    quoted = [json.dumps(part, ensure_ascii=ascii_only)[1:-1].encode() for ascii_only in (True, False)]
    with path.open("rb") as file:
        is_list = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        file.seek(0)
        for number, line in enumerate(() if is_list else file, 1):
            if not line.strip() or not (quoted[0] in line or quoted[1] in line):
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return  # still being written
                raise fail(f"{path} line {number}", f"is not valid JSON ({error})", "repair or delete it") from error
            if isinstance(row, dict):
                yield row
    if is_list:
        yield from (item for item in items_of(path) if isinstance(item, dict))


def items_of(path: Path) -> Iterator[Any]:
    """The items of a .json list, read a block at a time."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(64 + BLOCK).lstrip()[1:]  # `rows_of` saw the bracket within 64 bytes
        place = 0
        while True:
            place = BETWEEN.match(text, place).end()
            if text.startswith("]", place):
                return
            try:
                item, place = decoder.raw_decode(text, place)
            except ValueError as error:
                more = file.read(BLOCK)
                if not more:
                    raise fail(str(path), f"is not valid JSON ({error})", "repair it") from error
                text, place = text[place:] + more, 0
                continue
            yield item


def search(files: Files, identifier: str) -> list[Found]:
    """Rows with this id, rows made from it, and the sources of these and in turn of those; oldest first."""
    found = [
        Found(path, row, files.writer(path))
        for path in files.paths
        for row in rows_of(path, identifier)
        if identifier in (name_of(row), *sources_of(row))
    ]
    known = {(made.path.resolve(), name_of(made.row)) for made in found}
    for made in found:  # grows
        for source in sources_of(made.row) if made.run else []:
            beside = [path for path in files.paths if path.resolve().parent == made.run["folder"].resolve()]
            for path in [*files.inputs(made.run), *beside]:
                if source == identifier or (path.resolve(), source) in known:
                    continue
                known.add((path.resolve(), source))
                found += [
                    Found(path, row, files.writer(path)) for row in rows_of(path, source) if name_of(row) == source
                ]
    return sorted(found, key=Found.order)


def name_of(row: Record) -> str:
    return str(row.get("id"))


def sources_of(row: Record) -> list[str]:
    """Ids of the records that this one was made from, where its lineage names them; a preference pair has several."""
    lineage = row.get("lineage")
    if not isinstance(lineage, dict):
        return []
    chosen, rejected = (lineage.get(side) if isinstance(lineage.get(side), dict) else {} for side in SIDES)
    names = [lineage.get("source"), chosen.get("source"), rejected.get("record")]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def close_ids(files: Files, identifier: str) -> list[str]:
    """The three most similar ids; ids pass by in groups and only the best are remembered."""
    best: list[str] = []
    names = (name_of(row) for path in files.paths for row in rows_of(path))
    while group := set(islice(names, 10_000)):
        best = difflib.get_close_matches(identifier, group.union(best), 3)
    return best
