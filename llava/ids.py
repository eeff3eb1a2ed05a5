"""Ids of millions of records in little memory: a set, and an index of where records lie in files.

An id is kept as 64 bits of a hash; among ten million ids the chance that any two collide is 3 in a million.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llava.records import Record, RecordError, check_record, parse_json, read_records

RECENT = 1 << 16  # ids kept as Python objects before they join the sorted array


def number_of(identifier: str) -> int:
    return int.from_bytes(blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class IdSet:
    """A growing set of ids, 8 bytes each."""

    def __init__(self, ids: Iterable[str] = ()):
        self.recent: set[int] = set()
        self.settled = None  # sorted array of uint64, once there are many
        for identifier in ids:
            self.add(identifier)

    def __contains__(self, identifier: str) -> bool:
        return self.holds(number_of(identifier))

    def holds(self, number: int) -> bool:
        if number in self.recent:
            return True
        if self.settled is None:
            return False
        place = int(self.settled.searchsorted(self.settled.dtype.type(number)))  # a plain int would cast the array
        return place < len(self.settled) and int(self.settled[place]) == number

    def __len__(self) -> int:
        return len(self.recent) + (0 if self.settled is None else len(self.settled))

    def add(self, identifier: str) -> bool:
        """False when it was there already."""
        number = number_of(identifier)
        if self.holds(number):
            return False
        self.recent.add(number)
        if len(self.recent) == RECENT:
            import numpy as np

            fresh = np.sort(np.fromiter(self.recent, np.uint64, RECENT))
            settled = fresh if self.settled is None else np.insert(
                self.settled, self.settled.searchsorted(fresh), fresh
            )  # fmt: skip
            self.settled, self.recent = settled, set()
        return True


def read_unique(path: str | Path) -> Iterator[Record]:
    """`read_records`, refusing an id that occurs twice."""
    seen = IdSet()
    for record in read_records(path):
        if not seen.add(record["id"]):
            raise RecordError(
                f"{path}: id {record['id']!r} occurs twice. Fix: make ids unique; results are matched by id"
            )
        yield record


class RecordIndex:
    """Where the record of each id lies among JSON-lines files; 28 bytes a record.

    Args:
        paths: files of records with `id`, one a line.
        whole: the files are finished; else a last line without its newline is one being written, and passed over.

    Raises:
        RecordError: an id occurs twice.
    """

    def __init__(self, paths: list[Path], whole: bool = False):
        import numpy as np

        self.paths, rows = paths, []
        for file, path in enumerate(paths):
            found = np.fromiter(
                ((number_of(identifier), file, offset) for identifier, offset in id_lines(path, whole)), self.layout()
            )
            rows.append(found)
        self.rows = np.concatenate(rows) if rows else np.empty(0, self.layout())
        del rows
        self.rows.sort(order="number")
        self.numbers = numbers = np.ascontiguousarray(self.rows["number"])
        twice = np.flatnonzero(numbers[1:] == numbers[:-1])
        if len(twice):
            record = self.read(self.rows[int(twice[0])])
            raise RecordError(
                f"id {record['id']!r} occurs twice in {', '.join(sorted({str(path) for path in paths}))}. "
                "Fix: make ids unique; in the shards of a run, delete them and run again"
            )

    @staticmethod
    def layout():
        import numpy as np

        return np.dtype([("number", np.uint64), ("file", np.uint32), ("offset", np.uint64)])

    def read(self, row) -> Any:
        """The record of one row of the index."""
        with self.paths[int(row["file"])].open("rb") as file:
            file.seek(int(row["offset"]))
            return parse_json(file.readline(), str(self.paths[int(row["file"])]))

    def place(self, number: int) -> int | None:
        """Which row of the index an id has; None when it is not there."""
        place = int(self.numbers.searchsorted(self.numbers.dtype.type(number)))
        return place if place < len(self.numbers) and int(self.numbers[place]) == number else None

    def find(self, identifier: str, handle) -> Any | None:
        """The record of this id, read from its open file; None when there is none."""
        place = self.place(number_of(identifier))
        if place is None:
            return None
        handle.seek(int(self.rows["offset"][place]))
        where = f"{handle.name} at byte {handle.tell()}"
        return check_record(parse_json(handle.readline(), where), where)

    def lines(self, ids: Iterable[str], files: set[Path]) -> Iterator[str]:
        """The lines, as they are, of those of `ids` that lie in `files`, in the order of `ids`."""
        handles = {number: path.open("rb") for number, path in enumerate(self.paths) if path in files}
        try:
            for identifier in ids:
                place = self.place(number_of(identifier))
                if place is None:
                    continue
                handle = handles.get(int(self.rows["file"][place]))
                if handle is not None:
                    handle.seek(int(self.rows["offset"][place]))
                    yield handle.readline().decode()
        finally:
            for handle in handles.values():
                handle.close()


def id_lines(path: Path, whole: bool = False) -> Iterator[tuple[str, int]]:
    """(id, offset) of every line; of a file that is not `whole`, without a last line that has no newline."""
    with path.open("rb") as file:
        offset = 0
        for line in file:
            if line.strip() and (whole or line.endswith(b"\n")):
                row = parse_json(line, f"{path} at byte {offset}")
                if not isinstance(row, dict) or "id" not in row:
                    raise RecordError(f"{path} at byte {offset}: the record has no id. Fix: give it one")
                yield str(row["id"]), offset
            offset += len(line)
