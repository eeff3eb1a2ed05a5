"""Take out of training records what also occurs in benchmarks and, if asked, records that nearly repeat an earlier one.

reads   records (.json, .jsonl) and their images; benchmarks as VLMEvalKit TSVs (see llava/eval/questions.py)
writes  clean.jsonl           the records that stay, in input order and unchanged (numbers as ids become strings)
        removed.jsonl         the others: id, file, kind, and what they matched
        clean.rejected.jsonl  records with an image that cannot be read, with the reason

A record is removed for the first of these that holds for any of its images or turns:

image_exact       equal upright RGB pixels, whatever the container or EXIF turn (equal files have equal pixels)
image_perceptual  64-bit DCT codes at most 4 bits apart and 8x8 RGB thumbnails at most 8 of 255 levels apart
text_ngram        13 words in a row that a benchmark's question or one of its options has too; a question or option
                  of 8 to 12 words is compared as a whole, a shorter one not at all. Words are lower-cased runs of
                  letters and digits. What occurs in more than 10 rows of one benchmark is its template: not compared
near_duplicate    (--near_duplicates) an earlier record that stays shows images that look the same, is asked the same
                  words and answers nearly the same: both answers share 0.8 of their three-word runs (Jaccard).
                  The same image with another question stays, and so does every record without an image

Measured on copies (JPEG and WebP of quality 60, half size, half size + JPEG, longer side 336, 336 + JPEG):

                      bits, copies        levels   copies found   different pairs confused
57 COCO photos        at most 2           7        100%           none of 1,596; nearest code 18 bits
1,890 aerial photos   99%: 7, all: 19     5        98 to 100%     none of 1,785,105; nearest code 6 bits
231 drawn puzzles     99%: 8, all: 12     4        92 to 100%     15 of 26,565: the same layout, other digits or shapes
"""

import argparse
import hashlib
import os
import re
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from llava.errors import UserError, run_command
from llava.eval.questions import Row, images_of_row, options_of, read_tsv
from llava.ids import read_unique
from llava.images import ImageError, find_image, load_image
from llava.records import Record, images_of, messages_of, rejected_path, rejection, write_records
from llava.runs import open_run

KINDS = ("image_exact", "image_perceptual", "text_ngram", "near_duplicate")
CODE_DISTANCE = 4  # bits of 64
THUMBNAIL_DISTANCE = 8  # levels of 255
SHORTEST = 8  # words of a question that is compared as a whole
TEMPLATE_ROWS = 10
RESEMBLANCE = 0.8
BATCH = 512  # records or benchmark rows in flight
COSINES = np.cos(np.pi * np.outer(np.arange(8), 2 * np.arange(32) + 1) / 64)  # (8 frequencies, 32 pixels)
Origin = dict[str, str]  # where a match was found, as removed.jsonl names it


class Look(NamedTuple):
    """What is kept of an image."""

    digest: bytes  # SHA-256 of size and upright RGB pixels
    code: int  # 64 bits: which low frequencies are above their median
    thumbnail: bytes  # 8x8 RGB


def look_at(image: Image.Image) -> Look:
    """The look of an upright RGB image. Frequencies (in gray levels) are rounded, so that noise decides no bit."""
    digest = hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest()
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float64)  # (32, 32, 3)
    gray = pixels @ (0.299, 0.587, 0.114)  # (32, 32)
    low = np.round(COSINES @ gray @ COSINES.T / gray.size, 2).ravel()  # (64,), the first is the mean
    code = int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")
    thumbnail = pixels.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)  # (8, 8, 3)
    return Look(digest, code, thumbnail.tobytes())


def look_same(one: Look, other: Look) -> bool:
    """Whether both the codes and the thumbnails of two images are close."""
    first, second = (np.frombuffer(look.thumbnail, dtype=np.uint8).astype(np.int16) for look in (one, other))
    near = (one.code ^ other.code).bit_count() <= CODE_DISTANCE
    return near and bool(np.abs(first - second).max() <= THUMBNAIL_DISTANCE)


class HammingIndex:
    """64-bit codes, found again within `distance` bits without comparing all of them.

    The bits are cut into distance + 1 chunks. Codes at most `distance` bits apart share at least one whole chunk.
    """

    def __init__(self, distance: int):
        edges = [64 * number // (distance + 1) for number in range(distance + 2)]
        self.chunks = [(low, (1 << high - low) - 1) for low, high in pairwise(edges)]
        self.distance, self.codes = distance, array("Q")
        self.tables: list[dict[int, array]] = [{} for _ in self.chunks]  # chunk -> numbers of codes that have it

    def add(self, code: int) -> int:
        """The number of the new code: 0 for the first, then 1, ..."""
        for table, (shift, mask) in zip(self.tables, self.chunks, strict=True):
            table.setdefault(code >> shift & mask, array("I")).append(len(self.codes))
        self.codes.append(code)
        return len(self.codes) - 1

    def near(self, code: int) -> list[tuple[int, int]]:
        """(bits apart, number) of every code within the distance, sorted."""
        candidates: set[int] = set()
        for table, (shift, mask) in zip(self.tables, self.chunks, strict=True):
            candidates.update(table.get(code >> shift & mask, ()))
        close = (((self.codes[number] ^ code).bit_count(), number) for number in candidates)
        return sorted(pair for pair in close if pair[0] <= self.distance)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", re.sub(r"<image[^<>]*>", " ", text).lower())


def runs_of(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """All runs of `length` words: `a b` and `b c` of `a b c`; none when there are fewer."""
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def in_order(work: Callable[[Any], list[Look]], items: Iterable[Any]) -> Iterator[tuple[Any, Future[list[Look]]]]:
    """Every item with its work, done or failed, in order; BATCH items at a time, as many threads as cores."""
    remaining = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: Pillow and hashlib let others run while they work
        while batch := list(islice(remaining, BATCH)):
            yield from zip(batch, [pool.submit(work, item) for item in batch], strict=True)


class Benchmarks:
    """What is kept of benchmarks: looks of their images, hashes of their runs of words, and where each is from."""

    def __init__(self):
        self.digests: dict[bytes, Origin] = {}
        self.index = HammingIndex(CODE_DISTANCE)
        self.images: list[tuple[Look, Origin]] = []  # numbered as in `index`
        self.runs: dict[int, Origin] = {}
        self.lengths: set[int] = set()  # of the runs, in words
        self.templates: set[int] = set()  # runs that are not compared

    def read(self, path: Path, ngram: int) -> int:
        """Add one TSV; returns its number of rows. Raises UserError naming a row whose image cannot be read."""
        rows = read_tsv(path)
        by_index = {row["index"]: row for row in rows}
        counted: Counter[int] = Counter()
        for row, looks in in_order(lambda row: looks_of_row(row, path, by_index), rows):
            origin, hashes = {"benchmark": path.stem, "index": row["index"]}, set()
            for look in looks.result():
                if look.digest not in self.digests:
                    self.digests[look.digest] = origin
                    self.index.add(look.code)
                    self.images.append((look, origin))
            for words in map(words_of, (row["question"], *options_of(row).values())):
                length = min(ngram, max(len(words), SHORTEST))
                self.lengths.add(length)
                hashes |= {hash(run) for run in runs_of(words, length)}
            for run in hashes:
                self.runs.setdefault(run, origin)
            counted.update(hashes)
        self.templates |= {run for run, count in counted.items() if count > TEMPLATE_ROWS}
        return len(rows)

    def match(self, record: Record, looks: list[Look]) -> dict[str, Any] | None:
        """Kind and place of the first thing that a record and the benchmarks have in common."""
        seen = list(zip(images_of(record), looks, strict=True))
        for name, look in seen:
            if look.digest in self.digests:
                return {"kind": "image_exact", **self.digests[look.digest], "image": name}
        for name, look in seen:
            for bits, number in self.index.near(look.code):
                other, origin = self.images[number]
                if look_same(look, other):
                    return {"kind": "image_perceptual", **origin, "image": name, "distance": bits}
        for words in (words_of(m["content"]) for m in messages_of(record) if m["role"] != "system"):
            for run in (run for length in sorted(self.lengths, reverse=True) for run in runs_of(words, length)):
                if hash(run) in self.runs and hash(run) not in self.templates:
                    return {"kind": "text_ngram", **self.runs[hash(run)], "ngram": " ".join(run)}
        return None


def looks_of_row(row: Row, path: Path, by_index: dict[str, Row]) -> list[Look]:
    try:
        if not row.get("image") and not row.get("image_path"):
            raise ImageError("the row has no image")
        return [look_at(image) for image in images_of_row(row, by_index, path.parent)]
    except ImageError as error:
        raise UserError(f"{path}, index {row['index']}: {error}. Fix: repair or remove the row") from error


class Earlier:
    """Records that stay, found again by how their images look and what they ask; 1 to 2 kB each."""

    def __init__(self):
        self.index = HammingIndex(CODE_DISTANCE)
        self.numbers: dict[bytes, int] = {}  # digest of a first image -> its number in `index`
        self.records: dict[tuple[int, int], list[tuple[Origin, list[Look], array]]] = defaultdict(list)

    def match_or_add(self, record: Record, path: str, looks: list[Look]) -> dict[str, Any] | None:
        """What this record nearly repeats, or None: then it is an earlier one from now on, unless it has no image."""
        if not looks:
            return None
        said = {"system": "", "user": "", "assistant": ""}
        for message in messages_of(record):
            said[message["role"]] += message["content"] + "\n"
        question, answer = hash(tuple(words_of(said["user"]))), hashes_of(words_of(said["assistant"]))
        for bits, number in self.index.near(looks[0].code):
            for origin, others, other_answer in self.records.get((number, question), ()):
                alike = resemblance(answer, other_answer)
                if alike >= RESEMBLANCE and len(looks) == len(others) and all(map(look_same, looks, others)):
                    return {"kind": "near_duplicate", **origin, "distance": bits, "resemblance": round(alike, 3)}
        if looks[0].digest not in self.numbers:
            self.numbers[looks[0].digest] = self.index.add(looks[0].code)
        origin = {"earlier_id": record["id"], "earlier_file": path}
        self.records[self.numbers[looks[0].digest], question].append((origin, looks, answer))
        return None


def hashes_of(words: list[str]) -> array:
    """32-bit hashes of a text's runs of three words; a shorter text is one run."""
    return array("I", {zlib.crc32(" ".join(run).encode()) for run in runs_of(words, min(3, len(words)))})


def resemblance(one: array, other: array) -> float:
    """Jaccard similarity: runs in both texts over runs in either; 0.5 of (1, 2, 3) and (2, 3, 4)."""
    return len({*one} & {*other}) / len({*one} | {*other})


def filter_records(
    paths: list[str], folder: str, benchmarks: Benchmarks, earlier: Earlier | None, removed: list, rejected: list
) -> Iterator[Record]:
    """The records that stay; the others are appended to `removed` and `rejected`. Raises UserError if none stays."""
    look_at_file = lru_cache(1 << 15)(lambda name: look_at(load_image(find_image(folder, name))))
    records = ((path, record) for path in paths for record in read_unique(path))
    work = in_order(lambda item: [look_at_file(name) for name in images_of(item[1])], records)
    kept = 0
    for (path, record), looks in tqdm(work, "decontaminate", unit="record"):
        try:
            match = benchmarks.match(record, looks.result())
        except ImageError as error:
            rejected.append(rejection(record, str(error), file=path))
            continue
        if match is None and earlier is not None:
            match = earlier.match_or_add(record, path, looks.result())
        if match is not None:
            removed.append({"id": record["id"], "file": path, **match})
            continue
        kept += 1
        yield record
    if not kept:
        first = f"; the first: {rejected[0]['reason']}" if rejected else ""
        counts = f"{len(removed)} removed, {len(rejected)} with an unreadable image{first}"
        raise UserError(f"no record of {', '.join(paths)} is left: {counts}. Fix: check the data and --image_folder")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.decontaminate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", required=True, help="records (.json, .jsonl), comma-separated")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--benchmarks", nargs="+", default=[], help="VLMEvalKit TSV files, or folders of them")
    parser.add_argument("--image_folder", help="root of the image paths; default: the record file's folder")
    parser.add_argument("--near_duplicates", action="store_true", help="also remove near duplicates within the records")
    parser.add_argument("--ngram", type=int, default=13, help="words in a row that are the same text (default: 13)")
    parser.add_argument("--dry_run", action="store_true", help="check records and benchmarks, write nothing")
    arguments = parser.parse_args()
    paths = arguments.data_path.split(",")
    tables: list[Path] = []
    for path in map(Path, arguments.benchmarks):
        tables += sorted(path.glob("*.tsv")) if path.is_dir() else [path]
    if not tables and (arguments.benchmarks or not arguments.near_duplicates):
        raise UserError("nothing to compare with. Fix: give --benchmarks TSVs or their folder, or --near_duplicates")
    if arguments.ngram < 2:
        raise UserError(f"--ngram is {arguments.ngram}. Fix: give a number of words, 2 or more")
    if len(set(paths)) < len(paths) or len(set(tables)) < len(tables):
        raise UserError("a file is given twice. Fix: name each of --data_path and --benchmarks once")
    folder = arguments.image_folder or str(Path(paths[0]).parent)
    if not arguments.image_folder and any(str(Path(path).parent) != folder for path in paths):
        raise UserError("the files of --data_path lie in several folders. Fix: name their images' --image_folder")
    if arguments.dry_run:
        print(f"records      {sum(1 for path in paths for _ in read_unique(path)):,}, images below {folder}")
        print(f"compares     with {sum(len(read_tsv(path)) for path in tables):,} rows of {len(tables)} benchmarks")
        print(f"writes       {arguments.output_dir}/clean.jsonl (nothing was written)")
        return
    identity = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "dry_run")}
    with open_run(arguments.output_dir, "decontaminate", identity, [*paths, *tables]) as run:
        output = run.folder / "clean.jsonl"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        benchmarks, removed, rejected = Benchmarks(), [], []
        questions = sum(benchmarks.read(path, arguments.ngram) for path in tables)
        earlier = Earlier() if arguments.near_duplicates else None
        kept = write_records(output, filter_records(paths, folder, benchmarks, earlier, removed, rejected))
        write_records(run.folder / "removed.jsonl", removed)
        write_records(rejected_path(output), rejected)
        kinds = Counter(row["kind"] for row in removed)
        counts = {"in": kept + len(removed) + len(rejected), "kept": kept, **{kind: kinds[kind] for kind in KINDS}}
        counts |= {"rejected": len(rejected), "benchmark_rows": questions, "template_runs": len(benchmarks.templates)}
        run.finish(output, **counts)


if __name__ == "__main__":
    run_command(main)
