"""Preference pairs: what quality_evaluation/pairs.py writes and preference training reads. Standard library only.

    {"id": "000123-corrupted", "image": "coco/000123.jpg", "prompt": "<image>\nWhat is this?",
     "chosen": "A bus.", "rejected": "A boat.", "source": "corrupted", "lineage": {...}}

`image` is a path below the image folder, a list of them, or absent; the prompt has one `<image>` for each. `source` and
`lineage` are for people and for quality_evaluation/trace.py; training needs neither.
"""

from collections.abc import Iterator
from pathlib import Path

from llava.ids import IdSet
from llava.records import IMAGE, Record, fail, images_of, read_rows

TEXTS = ("id", "prompt", "chosen", "rejected")


def pair_problem(pair: Record) -> tuple[str, str] | None:
    """What makes a pair unusable, and the fix; None for a good one. Image files are not looked at."""
    for name in TEXTS:
        if not isinstance(pair.get(name), str):
            return f"field {name} is missing or no string", f"give {name} a text, or drop the pair"
        if not pair[name].strip():
            return f"field {name} is empty", f"give {name} a text, or drop the pair"
    if pair["chosen"].strip() == pair["rejected"].strip():
        return "fields chosen and rejected are equal", "drop the pair; equal answers teach no preference"
    names = images_of(pair)
    if not all(isinstance(name, str) and name for name in names):
        return "field image holds something else than paths", "a path below the image folder, or a list of paths"
    found = pair["prompt"].count(IMAGE)
    if found != len(names):
        fix = "one <image> in the prompt for each image" if names else "remove <image>, or add the image field"
        return f"field prompt has {found} <image> for {len(names)} images", fix
    for name in ("chosen", "rejected"):
        if IMAGE in pair[name]:
            return f"field {name} holds <image>", "remove it; images are shown in the prompt"
    return None


def check_pair(pair: Record, where: str) -> None:
    """Raise RecordError naming the field that is wrong and the fix, see `pair_problem`."""
    if problem := pair_problem(pair):
        raise fail(f"{where}, id {pair.get('id')!r}", *problem)


def read_pairs(path: str | Path) -> Iterator[Record]:
    """Stream the pairs of a `.jsonl` file or `.json` list. Raises RecordError at the first bad one or repeated id."""
    seen = IdSet()
    for number, pair in read_rows(path):
        where = f"{path} record {number}"
        if not isinstance(pair, dict):
            raise fail(where, f"is a {type(pair).__name__}, not an object", "one JSON object per pair")
        check_pair(pair, where)
        if not seen.add(pair["id"]):
            raise fail(where, f"id {pair['id']!r} occurs twice", "make ids unique")
        yield pair
