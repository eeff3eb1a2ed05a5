"""Several JSON-lines files written side by side that appear together, complete, or not at all; and parquet."""

import json
import os
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.records import dump, read_jsonl

ROWS = 5000  # of a parquet row group


class Outputs:
    """Write records to `folder/<name>.jsonl`; the files get their names when the block ends without an exception."""

    def __init__(self, folder: Path, names: list[str]):
        self.paths = {name: folder / f"{name}.jsonl" for name in names}
        self.files: dict[str, Any] = {}

    def __enter__(self) -> "Outputs":
        for name, path in self.paths.items():
            self.files[name] = path.with_name(f"{path.name}.{os.getpid()}.tmp").open(
                "w", encoding="utf-8", newline="\n"
            )
        return self

    def write(self, record: Any, *names: str) -> None:
        """One record into one or several of the files."""
        line = dump(record) + "\n"
        for name in names:
            self.files[name].write(line)

    def __exit__(self, kind, *_: object) -> None:
        for name, file in self.files.items():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if kind is None:
                os.replace(file.name, self.paths[name])
            else:
                Path(file.name).unlink()


def write_parquet(scored: Path, output: Path) -> None:
    """One row a record: id, images, kept, score, number of candidates, chosen and rejected text, candidates as JSON.

    Raises UserError when pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--parquet needs pyarrow ({error}). Fix: pip install pyarrow") from error
    from llava.records import images_of

    text = pyarrow.string()
    schema = pyarrow.schema({
        "id": text, "images": pyarrow.list_(text), "kept": pyarrow.bool_(), "score": pyarrow.float64(),
        "n_candidates": pyarrow.int32(), "chosen": text, "rejected": text, "candidates": text,
    })  # fmt: skip
    partial = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        rows: list[dict[str, Any]] = []
        for record in read_jsonl(scored):
            decision, candidates = record["decision"], record["candidates"]
            loser = decision["rejected"]
            rows.append({
                "id": record["id"], "images": images_of(record), "kept": decision["kept"], "score": decision["score"],
                "n_candidates": len(candidates), "chosen": candidates[decision["chosen"]]["text"],
                "rejected": None if loser is None else candidates[loser]["text"],
                "candidates": json.dumps(candidates, ensure_ascii=False),
            })  # fmt: skip
            if len(rows) == ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    os.replace(partial, output)
