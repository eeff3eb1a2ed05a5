"""Records and their files: what every stage reads and writes. Standard library only.

A record is the LLaVA JSON people already have, plus optional fields that stages add:

    {"id": "000123", "image": "coco/000123.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}],
     "candidates": [...], "scores": [...], "chosen": "...", "rejected": "...", "lineage": {...}}

`.json` (one list) and `.jsonl` are read; `.jsonl` is written. Whole files appear by rename, so a file that exists is
complete; growing files are append-only, one record a line, and a torn last line is cut off when they are opened again.
Rows are matched by `id`, never by position. A row that fails is written to `<output>.rejected.jsonl` with its reason.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command

Record = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
IMAGE = "<image>"


class RecordError(UserError):
    """A file or record that cannot be used. The message names file, line, id, field and the fix."""


def fail(where: str, problem: str, fix: str) -> RecordError:
    return RecordError(f"{where}: {problem}. Fix: {fix}")


def read_records(path: str | Path) -> Iterator[Record]:
    """Stream the records of a `.json` list or a `.jsonl` file, each checked by `check_record`.

    Integer ids become strings. Raises RecordError at the first record that is no record.
    """
    for line, record in read_rows(path):
        where = f"{path} record {line}"
        if not isinstance(record, dict):
            raise fail(where, f"is a {type(record).__name__}, not an object", "one JSON object per record")
        yield check_record(record, where)


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line or item number, parsed value) of a JSON list or JSON-lines file. Duplicate keys and NaN are errors."""
    path = Path(path)
    if not path.is_file():
        raise fail(str(path), "is no file", "give the path of a .json or .jsonl file of records")
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            yield from enumerate(parse_json(file.read(), str(path)), 1)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, parse_json(line, f"{path} line {number}")


def parse_json(data: bytes, where: str) -> Any:
    try:
        value = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=unique_keys, parse_constant=no_constant, parse_float=finite
        )
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could be read but never written
        return value
    except (ValueError, RecursionError) as error:
        raise fail(where, f"is not valid JSON ({error})", "repair or delete it") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return fields


def finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return number


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def check_record(record: Record, where: str) -> Record:
    """The record with a string id, or RecordError saying which field is wrong and what to do."""
    identifier = record.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        record = {**record, "id": str(identifier)}
    elif not isinstance(identifier, str) or not identifier:
        fix = "give every record a unique id; `python -m llava.records FILE --number --output OUT` numbers them"
        raise fail(where, f"field id is {identifier!r}", fix)
    where = f"{where}, id {record['id']!r}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise fail(where, "field conversations is missing or empty", 'a list of {"from": "human"|"gpt", "value": ...}')
    for number, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if role else None
        if role is None:
            raise fail(where, f"conversations[{number}] has no known speaker", 'set "from" to "human" or "gpt"')
        if not isinstance(text, str):
            raise fail(where, f"conversations[{number}] has no text", 'set "value" to a string')
    for name in images_of(record):
        if not isinstance(name, str) or not name:
            raise fail(where, f"field image holds {name!r}", "a path below the image folder, or a list of paths")
    return record


def images_of(record: Record) -> list[str]:
    """The record's image paths: none, one or several."""
    image = record.get("image")
    if image is None:
        return []
    return image if isinstance(image, list) else [image]


def messages_of(record: Record) -> list[dict[str, str]]:
    """The conversation as role/content messages, in order."""
    return [
        {"role": ROLES[turn.get("from", turn.get("role"))], "content": turn.get("value", turn.get("content"))}
        for turn in record["conversations"]
    ]


def question_of(record: Record) -> str:
    """The first thing the user says."""
    for message in messages_of(record):
        if message["role"] == "user":
            return message["content"]
    raise RecordError(f"record {record['id']!r} has no human turn. Fix: add one, or drop the record")


def check_placeholders(record: Record, where: str) -> None:
    """Raise RecordError unless the user's turns hold exactly one `<image>` per image."""
    images = len(images_of(record))
    found = sum(message["content"].count(IMAGE) for message in messages_of(record) if message["role"] == "user")
    if found != images:
        fix = "one <image> in the human turn for each image" if images else "remove <image>, or add the image field"
        raise fail(f"{where}, id {record['id']!r}", f"{images} images but {found} <image> in the text", fix)


def check_trainable(record: Record, where: str) -> None:
    """Raise RecordError unless turns alternate user, assistant and at least one answer is not empty."""
    roles = [message["role"] for message in messages_of(record) if message["role"] != "system"]
    expected = ["user", "assistant"] * (len(roles) // 2)
    if roles != expected or not roles:
        raise fail(f"{where}, id {record['id']!r}", f"speakers are {roles}", "alternate human and gpt, human first")
    if not any(m["content"].strip() for m in messages_of(record) if m["role"] == "assistant"):
        raise fail(
            f"{where}, id {record['id']!r}", "every answer is empty", "give the gpt turn a text, or drop the record"
        )


def check_for_training(record: Record, where: str) -> None:
    """Everything a training record must be: see `check_placeholders` and `check_trainable`."""
    check_placeholders(record, where)
    check_trainable(record, where)


def dump(record: Any) -> str:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def write_records(path: str | Path, records: Iterable[Any]) -> int:
    """Write a JSON-lines file that appears complete or not at all; returns the number of records."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for record in records:
            count += 1
            yield dump(record) + "\n"

    write_atomically(path, lines())
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write an indented JSON file that appears complete or not at all."""
    write_atomically(path, [json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"])


def write_atomically(path: str | Path, pieces: Iterable[str]) -> None:
    """Write text beside `path`, flush it to disk, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class RecordAppender:
    """An append-only JSON-lines file that survives a kill: reopen it and go on.

    A torn last line is cut off on opening. Every `append` reaches the operating system before it returns; every
    `sync_every` records reach the disk.
    """

    def __init__(self, path: str | Path, sync_every: int = 64):
        self.path, self.sync_every, self.unsynced = Path(path), sync_every, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self.path)
        self.file = self.path.open("ab", buffering=0)

    def append(self, record: Any) -> None:
        data = (dump(record) + "\n").encode()
        if self.file.write(data) != len(data):
            raise OSError(f"{self.path}: only part of a record could be written; is the disk full?")
        self.unsynced += 1
        if self.unsynced >= self.sync_every:
            os.fsync(self.file.fileno())
            self.unsynced = 0

    def __enter__(self) -> "RecordAppender":
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self.file.fileno())
        self.file.close()


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: the half-written record of a killed process."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = keep = file.seek(0, os.SEEK_END)
        while keep > 0:
            start = max(keep - 65536, 0)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < size:
            file.truncate(keep)


def rejected_path(output: str | Path) -> Path:
    """Where the failed rows of `output` go."""
    output = Path(output)
    return output.with_name(f"{output.stem}.rejected.jsonl")


def rejection(record: Record, reason: str, **details: Any) -> Record:
    """A row of a rejected file: the id, why it failed, and what helps to repair it."""
    return {"id": record.get("id"), "reason": reason, **details}


def read_jsonl(path: str | Path) -> Iterator[Any]:
    """Values of a growing JSON-lines file; nothing when it does not exist yet.

    A last line without its newline is a record that is still being written, or was cut off: it is not there yet.
    """
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n") and line.strip():
                yield parse_json(line, f"{path} line {number}")


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def numbered(paths: list[str]) -> Iterator[Record]:
    """The records of all files with ids <file stem>-<number>, with the file's number where stems repeat."""
    stems = [Path(path).stem for path in paths]
    for place, (path, stem) in enumerate(zip(paths, stems, strict=True), 1):
        prefix = stem if stems.count(stem) == 1 else f"{stem}-{place}"
        for number, row in read_rows(path):
            if not isinstance(row, dict):
                raise fail(
                    f"{path} record {number}", f"is a {type(row).__name__}, not an object", "one JSON object per record"
                )
            yield {**row, "id": f"{prefix}-{number}"}


PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def records_of_folder(folder: str | Path, question: str) -> list[Record]:
    """One unlabelled record per image file below `folder`, sorted by path; the id is the path.

    Raises RecordError when the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise fail(str(folder), "is no folder", "give the folder that holds your images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
    if not found:
        raise fail(
            str(folder), f"holds no image ({', '.join(PHOTO_SUFFIXES)})", "give the folder that holds your images"
        )
    names = [path.relative_to(folder).as_posix() for path in found]
    turns = [{"from": "human", "value": f"{IMAGE}\n{question}"}]
    return [{"id": name, "image": name, "conversations": turns} for name in names]


def list_training_problems(path: str) -> None:
    """Print every record that cannot train. Raises RecordError when there is one."""
    bad = 0
    for number, record in enumerate(read_records(path), 1):
        try:
            check_for_training(record, f"{path} record {number}")
        except RecordError as error:
            bad += 1
            print(error)
    if bad:
        raise RecordError(f"{path}: {bad} records cannot train")


def main() -> None:
    """Check record files, give every record a new unique id, or list a folder of images as records."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m llava.records", description=main.__doc__)
    parser.add_argument("files", nargs="*", help=".json or .jsonl files of records to check")
    parser.add_argument(
        "--training", action="store_true", help="also check placeholders and turns, and list every problem"
    )
    parser.add_argument("--number", action="store_true", help="write the files' records with ids <file stem>-<number>")
    parser.add_argument("--from_folder", help="write one record per image below this folder")
    parser.add_argument(
        "--question", default="Please describe the image in detail.", help="first turn with --from_folder"
    )
    parser.add_argument("--output", help="where --number and --from_folder write")
    arguments = parser.parse_args()
    if bool(arguments.files) == bool(arguments.from_folder):
        parser.error("give record files, or --from_folder FOLDER")
    if (arguments.number or arguments.from_folder) and not arguments.output:
        parser.error("--output is missing")
    if arguments.from_folder:
        count = write_records(arguments.output, records_of_folder(arguments.from_folder, arguments.question))
        print(f"{count} records in {arguments.output}; their image folder is {arguments.from_folder}")
    elif arguments.number:
        print(f"{write_records(arguments.output, numbered(arguments.files))} records in {arguments.output}")
    else:
        for path in arguments.files:
            ids = [record["id"] for record in read_records(path)]
            if len(set(ids)) < len(ids):
                twice = next(identifier for identifier, count in Counter(ids).items() if count > 1)
                raise fail(path, f"id {twice!r} occurs twice", "make ids unique; results are matched by id")
            print(f"{path}: {len(ids)} records, all valid, ids unique")
            if arguments.training:
                list_training_problems(path)


if __name__ == "__main__":
    run_command(main)
