"""Mix record files into one training file, in stated proportions and with a seed.

    python -m quality_evaluation.mix --output_dir runs/warmup-70k --data cod.jsonl:35000 dd.jsonl:35000
    python -m quality_evaluation.mix --output_dir runs/stage15 --data captions.jsonl answers.jsonl text_only.jsonl:10%

`FILE` takes all records, `FILE:35000` so many drawn without repetition, `FILE:10%` that share of the mixture. Records that
several files share keep one id each: a later one gets the file's number behind its id.

reads   training records
writes  mixed.jsonl (shuffled; where each record came from in `mixed_from`), run.json with the counts
"""

import argparse
import math
import os
import random
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.ids import IdSet, RecordIndex, id_lines, read_unique
from llava.images import find_image
from llava.records import Record, check_for_training, check_record, images_of, parse_json, write_records
from llava.runs import open_run
from llava.seeds import seed_of


def parse_part(text: str) -> tuple[str, str]:
    """`FILE:AMOUNT` as path and amount; the amount is empty for all.

    >>> parse_part("runs/a.jsonl:10%"), parse_part("b.json")
    (('runs/a.jsonl', '10%'), ('b.json', ''))
    """
    path, colon, amount = text.rpartition(":")
    if not colon or not amount.rstrip("%").replace(".", "").isdigit():
        return text, ""
    return path, amount


def shares(amounts: list[str], available: list[int]) -> list[int]:
    """How many records each part gives.

    Args:
        amounts: '' for all, '35000' for a number, '10%' for a share of the whole mixture.
        available: records of each file.

    Raises:
        UserError: a file has too few records, or the shares leave nothing for the rest.

    >>> shares(["", "100", "20%"], [500, 300, 400])
    [500, 100, 150]
    """
    counts = [
        have if not amount else int(amount) if "%" not in amount else 0
        for amount, have in zip(amounts, available, strict=True)
    ]
    parts = [float(amount[:-1]) / 100 if "%" in amount else 0.0 for amount in amounts]
    whole = math.isclose(sum(parts), 1)
    if (whole and sum(counts)) or (sum(parts) > 1 and not whole):
        raise UserError(f"the shares make {sum(parts):.0%} of the mixture and leave nothing for the other files")
    if whole:  # shares alone: the largest mixture that the files can fill
        total = min(int(have / part) for have, part in zip(available, parts, strict=True) if part)
    else:
        total = sum(counts) / (1 - sum(parts))
    counts = [count or round(part * total) for count, part in zip(counts, parts, strict=True)]
    for number, (count, have) in enumerate(zip(counts, available, strict=True)):
        if count > have:
            raise UserError(f"file {number + 1} has {have:,} records, {count:,} are wanted. Fix: ask for fewer")
    if not sum(counts):
        raise UserError("the mixture would be empty. Fix: ask for more records")
    return counts


def drawn(paths: list[str], counts: list[int], available: list[int], seed: int) -> list[tuple[int, int]]:
    """(file, number of the record in it) of the mixture, shuffled."""
    chosen: list[tuple[int, int]] = []
    for file, (path, count, have) in enumerate(zip(paths, counts, available, strict=True)):
        rng = random.Random(seed_of(seed, Path(path).name, file))
        chosen += [(file, number) for number in sorted(rng.sample(range(have), count))]
    random.Random(seed_of(seed, "order")).shuffle(chosen)
    return chosen


class Lines:
    """Records of a file by number, read where they lie; a `.json` list is held whole."""

    def __init__(self, path: str):
        self.path = path
        if Path(path).suffix == ".jsonl":
            RecordIndex([Path(path)], whole=True)  # ids occur once
            self.offsets, self.records = [offset for _, offset in id_lines(Path(path), whole=True)], None
            self.handle = open(path, "rb")  # noqa: SIM115 (as long as the process)
        else:
            self.records = list(read_unique(path))

    def __len__(self) -> int:
        return len(self.offsets) if self.records is None else len(self.records)

    def __getitem__(self, number: int) -> Record:
        if self.records is not None:
            return self.records[number]
        self.handle.seek(self.offsets[number])
        where = f"{self.path} record {number + 1}"
        return check_record(parse_json(self.handle.readline(), where), where)


def mixed(files: list[Lines], chosen: list[tuple[int, int]], root: Path | None):
    """The records of the mixture, ids unique; images named from `root`, those of a file lying beside it."""
    ids = IdSet()
    for file, number in chosen:
        record = files[file][number]
        check_for_training(record, f"{files[file].path} record {number + 1}")
        identifier = record["id"]
        while not ids.add(identifier):
            identifier = f"{identifier}+{file + 1}"
        moved: dict[str, Any] = {}
        if images_of(record) and root:
            beside = Path(files[file].path).resolve().parent
            paths = [find_image(beside, name).relative_to(root).as_posix() for name in images_of(record)]
            moved["image"] = paths if isinstance(record["image"], list) else paths[0]
        yield {**record, **moved, "id": identifier, "mixed_from": {"file": files[file].path, "id": record["id"]}}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.mix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", required=True, help="FILE, FILE:COUNT or FILE:SHARE%%")
    parser.add_argument("--image_folder", help="one root of all images (default: each file's images lie beside it)")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the order (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="count, write nothing")
    arguments = parser.parse_args()
    paths, amounts = zip(*map(parse_part, arguments.data), strict=True)
    files = [Lines(path) for path in paths]
    available = [len(file) for file in files]
    counts = shares(list(amounts), available)
    for path, count, have in zip(paths, counts, available, strict=True):
        print(f"{count / max(sum(counts), 1):6.1%}  {count:,} of {have:,}  {path}")
    if arguments.dry_run:
        print(f"writes       {arguments.output_dir}/mixed.jsonl (nothing was written)")
        return
    identity = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "dry_run")}
    with open_run(arguments.output_dir, "mix", identity, list(paths)) as run:
        output = run.folder / "mixed.jsonl"
        if run.complete:
            print(f"[mix] already complete -> {output}")
            return
        chosen = drawn(list(paths), counts, available, arguments.seed)
        root = None
        if not arguments.image_folder:
            root = Path(os.path.commonpath([Path(path).resolve().parent for path in paths]))
        written = write_records(output, mixed(files, chosen, root))
        print(f"images       IMAGE_FOLDER={arguments.image_folder or root} for what reads {output}")
        run.finish(output, files=len(files), out=written)


if __name__ == "__main__":
    run_command(main)
