"""Candidate files pooled by id: one record after the other, with the candidates of all files.

A `.jsonl` file is read where its lines lie; 28 bytes of each record are held. A `.json` list is held whole.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.ids import RecordIndex, read_unique
from llava.records import Record, RecordError, images_of


class CandidateFile:
    """Records of one file by id."""

    def __init__(self, path: str):
        self.path = path
        self.index = RecordIndex([Path(path)], whole=True) if Path(path).suffix == ".jsonl" else None
        self.records = {} if self.index else {record["id"]: record for record in read_unique(path)}
        self.handle = open(path, "rb") if self.index else None  # noqa: SIM115 (closed by `close`)

    def ids(self) -> Iterator[str]:
        return (record["id"] for record in read_unique(self.path)) if self.index else iter(self.records)

    def find(self, identifier: str) -> Record | None:
        if self.index is None:
            return self.records.get(identifier)
        return self.index.find(identifier, self.handle)

    def close(self) -> None:
        if self.handle:
            self.handle.close()


def pool(paths: list[str], allow_cut_off: bool = False) -> Iterator[tuple[Record, int]]:
    """One record per id in order of first appearance, candidates joined, and how many of them were left out.

    Raises RecordError when the same id shows different images in two files, or the same draw comes twice.
    """
    files = [CandidateFile(path) for path in paths]
    try:
        for number, file in enumerate(files):
            for identifier in file.ids():
                if any(earlier.find(identifier) is not None for earlier in files[:number]):
                    continue
                found = [(other.path, other.find(identifier)) for other in files[number:]]
                yield joined([(path, record) for path, record in found if record is not None], allow_cut_off)
    finally:
        for file in files:
            file.close()


def joined(found: list[tuple[str, Record]], allow_cut_off: bool) -> tuple[Record, int]:
    """The first record with the usable candidates of all."""
    first = found[0][1]
    candidates: list[dict[str, Any]] = []
    left_out = 0
    for path, record in found:
        if images_of(first) != images_of(record):
            raise RecordError(
                f"{path}: id {record['id']!r} shows {images_of(record)}, but {images_of(first)} in an earlier file. "
                "Fix: pool only runs over the same records"
            )
        offered = candidates_of(record)
        usable_ones = [item for item in offered if usable(item, allow_cut_off)]
        left_out += len(offered) - len(usable_ones)
        for item in usable_ones:
            if same_draw(item, candidates):
                raise RecordError(
                    f"{path}: id {record['id']!r} has a candidate with the model, prompt and seed of an earlier file. "
                    "Fix: pool runs with different SEED; the same draw twice would agree with itself"
                )
        candidates += [{**item, "file": path} for item in usable_ones]
    return {**first, "candidates": candidates}, left_out


def candidates_of(record: Record) -> list[dict[str, Any]]:
    """The record's candidates as objects with `text`."""
    found = record.get("candidates")
    for field in ("generated_caption", "generated_thought"):
        if found is None and field in record:
            found = [record[field]]
    if not isinstance(found, list):
        raise RecordError(
            f"record {record['id']!r} has no candidates. Fix: give files written by llava.generate, or records "
            "with a `candidates` list"
        )
    candidates = [{"text": item} if isinstance(item, str) else item for item in found]
    for number, item in enumerate(candidates):
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise RecordError(
                f"record {record['id']!r}: candidate {number} is {found[number]!r}. Fix: a string, or an object with `text`"
            )
    return candidates


def usable(candidate: dict[str, Any], allow_cut_off: bool) -> bool:
    """Not empty, and not cut off at max_new_tokens: a text without its end teaches to stop anywhere."""
    return bool(candidate["text"].strip()) and (allow_cut_off or candidate.get("finish_reason") != "length")


def same_draw(candidate: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether another candidate was drawn by the same model, prompt and seed."""
    keys = ("model_hash", "style", "seed")
    if candidate.get("model_hash") is None or any(key not in candidate for key in keys):
        return False
    return any(all(other.get(key) == candidate[key] for key in keys) for other in others)
