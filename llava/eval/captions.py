"""Captions against the truth: hallucinated objects, agreement with reference captions, length and repetition.

    python -m llava.eval.captions --data_path base=runs/a/candidates.jsonl,SICOG=runs/b/candidates.jsonl \\
        --references captioned.json --objects objects.json --output_dir runs/caption-quality

reads   captions as records: all `candidates`; the chosen one where there is a `decision`; else the first gpt turn
        references by id: every gpt turn is a true caption, and so is every string of a field `captions`; a field
        `objects` lists what the image shows: names, or objects with a name, label or category
        objects: {"id": ["dog", "hot dog"], ...}, in place of the references' field
        a vocabulary: a line for each object, its name first, synonyms after commas; default: all listed objects
writes  captions.json, captions.md (the table), per_image.jsonl (values and hallucinated objects of every image),
        captions.rejected.jsonl (records without a caption or a reference, with the reason)

Words are lower-cased runs of letters and digits. Of a caption in steps the final description is measured (`--part whole`:
all steps without their headings), of a reference too. Candidates of an image are averaged first, then images.

CHAIR_i            mentions of objects that the image does not show, of all mentions (Rohrbach et al. 2018)
CHAIR_s            captions with at least one such mention
objects covered    of the objects that an image shows, those that its caption names
content words      different words but for stop words: the share of the caption's that the reference has (precision), of the
                   reference's that the caption has (recall), their harmonic mean (F1)
ROUGE-L F1         words in the longest common subsequence, as a share of both lengths
repeated 4-grams   runs of four words that occurred before in the same caption

Mentions are found from left to right, the longest name first, plurals included, within pieces that `.,;:!?` and new
lines separate; "no dog" mentions a dog, "an orange shirt" an orange. As published, an object that a reference names is
present too; with a vocabulary and no lists that alone decides, without either nothing is said about objects. Of several
references the best counts. An empty caption agrees with nothing (0) and names nothing. CHAIR_i and objects covered are
shares of all images' mentions and objects together. Intervals are 95%: a percentile bootstrap over images, or Wilson's
for CHAIR_s and empty captions where every image has one caption.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava.errors import UserError, run_command
from llava.eval.caption_measures import MEASURES, VALUES, Values, Vocabulary, measure, vocabulary_of, words_of
from llava.ids import read_unique
from llava.prompts import final_description, parse_steps
from llava.records import (
    Record,
    check_record,
    fail,
    messages_of,
    parse_json,
    read_rows,
    rejected_path,
    rejection,
    write_atomically,
    write_json,
    write_records,
)
from llava.runs import open_run


class Truth(NamedTuple):
    """What is known about an image: captions, and the names of its objects or None where no list was given."""

    captions: list[str]
    objects: list[str] | None


def read_truth(references: str | None, objects: str | None) -> dict[str, Truth]:
    """Truth by id. Raises RecordError naming a row that cannot be used."""
    truth: dict[str, Truth] = {}
    for number, row in read_rows(references) if references else ():
        where = f"{references} record {number}"
        if not isinstance(row, dict):
            raise fail(where, f"is a {type(row).__name__}, not an object", "one JSON object per record")
        captions = row.get("captions", [])
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise fail(where, "field captions is not a list of strings", "one string for each reference")
        if "conversations" not in row and ("captions" in row or "objects" in row):
            row = {**row, "conversations": [{"from": "gpt", "value": ""}]}
        row = check_record(row, where)
        if row["id"] in truth:
            raise fail(where, f"id {row['id']!r} occurs twice", "one record an image, its references in `captions`")
        said = [turn["content"] for turn in messages_of(row) if turn["role"] == "assistant"]
        listed = names_of(row["objects"], where) if row.get("objects") is not None else None
        truth[row["id"]] = Truth([text for text in (*said, *captions) if text.strip()], listed)
    if objects:
        lists = parse_json(Path(objects).read_bytes(), objects)
        if not isinstance(lists, dict):
            raise fail(objects, "is not one JSON object", 'write {"id": ["name", ...], ...}')
        for identifier, listed in lists.items():
            captions = truth[identifier].captions if identifier in truth else []
            truth[identifier] = Truth(captions, names_of(listed, f"{objects}, id {identifier!r}"))
    return truth


def names_of(objects: Any, where: str) -> list[str]:
    """The names of a list of objects. Raises RecordError for anything that has none."""
    names = []
    for item in objects if isinstance(objects, list) else [None]:
        if isinstance(item, dict):
            item = next((item[key] for key in ("name", "label", "category") if key in item), None)
        if not isinstance(item, str) or not words_of(item):
            raise fail(where, "objects is not a list of names", 'a list of strings, or of {"name": ...}')
        names.append(item)
    return names


def captions_of(record: Record, path: str) -> list[str]:
    """The generated captions of a record, none or several. Raises RecordError when `candidates` hold no text."""
    if "candidates" not in record:
        return [turn["content"] for turn in messages_of(record) if turn["role"] == "assistant"][:1]
    try:
        candidates = record["candidates"]
        texts = [candidates[record["decision"]["chosen"]]["text"]] if record.get("decision") else [
            candidate["text"] for candidate in candidates
        ]  # fmt: skip
    except (KeyError, IndexError, TypeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise fail(
            f"{path}, id {record['id']!r}", "its candidates have no text", "give a file of candidates or of captions"
        )
    return texts


def steps_without_headings(caption: str) -> str:
    return "\n".join(parse_steps(caption).values()) or caption


class Yardstick:
    """What captions are held against: truth by id, the vocabulary, and which part of a text counts.

    Raises:
        UserError: no image has a truth, or the vocabulary holds none of the listed objects.
    """

    def __init__(self, truth: dict[str, Truth], lines: list[list[str]] | None, part: str):
        self.part: Callable[[str], str] = final_description if part == "final" else steps_without_headings
        self.truth = {
            identifier: Truth([self.part(text) for text in known.captions], known.objects)
            for identifier, known in truth.items()
            if known.captions or known.objects is not None
        }
        listed = {name for known in self.truth.values() for name in known.objects or ()}
        self.lists = any(known.objects is not None for known in self.truth.values())
        if not self.truth:
            raise UserError("no reference has a caption or objects. Fix: check --references and --objects")
        self.vocabulary = Vocabulary(lines) if lines is not None else vocabulary_of(listed) if listed else None
        self.unknown = sorted(name for name in listed if self.vocabulary.canonical(name) is None)
        if listed and len(self.unknown) == len(listed):
            raise UserError(
                f"none of the listed objects ({self.unknown[0]!r}, ...) is in the vocabulary. Fix: check both files"
            )

    def present(self, known: Truth) -> set[str] | None:
        """First names of what is listed and of what the references name; None for an image without its list."""
        if self.vocabulary is None or (self.lists and known.objects is None):
            return None
        names = {self.vocabulary.canonical(name) for name in known.objects or ()} - {None}
        return names.union(*(self.vocabulary.mentions(caption) for caption in known.captions))

    def measure(self, identifier: str, captions: list[str]) -> "MeasuredImage":
        known, sums, hallucinated = self.truth[identifier], dict.fromkeys(VALUES, 0.0), set()
        present = self.present(known)
        for caption in captions:
            values, mentions = measure(self.part(caption), known.captions, present, self.vocabulary)
            hallucinated.update(mentions)
            for key, value in values.items():
                sums[key] += value
        means = {key: value / len(captions) for key, value in sums.items()}
        return MeasuredImage(len(captions), means, sorted(hallucinated))


class MeasuredImage(NamedTuple):
    captions: int
    values: Values  # means over the captions
    hallucinated: list[str]  # first names of all objects that a caption hallucinates


class MeasuredFile(NamedTuple):
    path: str
    images: dict[str, MeasuredImage]  # by id
    rejected: list[Record]


def measure_file(path: str, yardstick: Yardstick) -> MeasuredFile:
    """Raises UserError when no record of the file can be measured."""
    measured, example = MeasuredFile(path, {}, []), None
    for record in read_unique(path):
        identifier, example = record["id"], example or record["id"]
        captions = captions_of(record, path)
        if identifier not in yardstick.truth or not captions:
            reason = (
                "the record has no caption"
                if identifier in yardstick.truth
                else "no reference and no list of objects has this id"
            )
            measured.rejected.append(rejection(record, reason, file=path))
            continue
        measured.images[identifier] = yardstick.measure(identifier, captions)
    if not measured.images:
        reasons = f"its first id is {example!r}, that of the references {next(iter(yardstick.truth))!r}"
        raise UserError(f"{path}: no record has both a caption and a reference; {reasons}. Fix: give both the same ids")
    return measured


def sums_to_measures(sums: Any) -> Any:
    """(..., values) sums over images -> (..., measures), NaN where a measure is undefined."""
    import numpy as np

    pairs = [(VALUES.index(row.numerator), VALUES.index(row.denominator)) for row in MEASURES.values()]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack([sums[..., above] / sums[..., below] for above, below in pairs], axis=-1)


def estimates(files: list[list[Values]], seed: int) -> dict[str, dict[str, float] | None]:
    """Value and 95% interval of each measure of one file, or of the second minus the first of two with the same images.

    None where the measure is undefined, as CHAIR_i is when no caption names an object.
    """
    import numpy as np

    from llava.eval.totals import resampled

    tables = [
        np.array([[image[value] for value in VALUES] for image in images]) for images in files
    ]  # (images, values)
    points = [sums_to_measures(table.sum(0)) for table in tables]  # (measures,)
    draws = resampled(sums_to_measures, tables, seed)  # (samples, measures)
    if len(files) == 2:
        points, draws = [points[1] - points[0]], [draws[1] - draws[0]]
    found: dict[str, dict[str, float] | None] = {}
    for key, value, drawn in zip(MEASURES, points[0], draws[0].T, strict=True):
        found[key] = None
        if not np.isnan(value):
            low, high = np.nanpercentile(drawn, (2.5, 97.5))
            found[key] = {"value": round(value, 6), "low": round(low, 6), "high": round(high, 6)}
    return found


def summary(measured: MeasuredFile, seed: int) -> dict[str, Any]:
    """Counts and measures of one file."""
    from llava.eval.totals import wilson

    values = [image.values for image in measured.images.values()]
    images, captions = len(values), sum(image.captions for image in measured.images.values())
    found = estimates([values], seed)
    for key in ("chair_s", "empty") if images == captions else ():  # shares of single captions
        row = MEASURES[key]
        above, below = (int(sum(image[name] for image in values)) for name in (row.numerator, row.denominator))
        if below:
            low, high = wilson(above, below)
            found[key] |= {"low": round(low, 6), "high": round(high, 6)}
    counts = {"images": images, "captions": captions, "rejected": len(measured.rejected)}
    counts["images_with_objects"] = int(sum(image["with_objects"] for image in values))
    return {"file": measured.path, **counts, "measures": found}


def difference(first: MeasuredFile, last: MeasuredFile, seed: int) -> dict[str, Any] | None:
    """Measures of the last minus the first on the images that both have; None when they share none."""
    shared = [identifier for identifier in first.images if identifier in last.images]
    if not shared:
        return None
    files = [[file.images[identifier].values for identifier in shared] for file in (first, last)]
    return {"images": len(shared), "measures": estimates(files, seed)}


def shown(estimate: dict[str, float] | None, percent: bool, sign: str = "") -> str:
    if estimate is None:
        return "-"
    scale, digits = (100, 1) if percent else (1, 2)
    value, low, high = (f"{scale * estimate[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(results: dict[str, dict[str, Any]], paired: dict[str, Any] | None) -> list[list[str]]:
    """Header and rows; the last column compares the last file with the first. Measures that no file has are left out."""
    names = list(results)
    rows = [["measure", *names, *([f"{names[-1]} - {names[0]}"] if paired else [])]]
    for count in ("images", "captions"):
        shared = [f"{paired['images']:,} in both"] if paired and count == "images" else [""] if paired else []
        rows.append([count, *(f"{result[count]:,}" for result in results.values()), *shared])
    for key, row in MEASURES.items():
        found = [result["measures"][key] for result in results.values()]
        if any(found):
            cells = [shown(estimate, row.percent) for estimate in found]
            compared = [shown(paired["measures"][key], row.percent, "+")] if paired else []
            rows.append([f"{row.label}{', %' if row.percent else ''}", *cells, *compared])
    return rows


def image_rows(measured: dict[str, MeasuredFile]) -> Iterator[Record]:
    """The rows of per_image.jsonl: measures of each image, None where undefined."""
    for name, file in measured.items():
        for identifier, (captions, values, hallucinated) in file.images.items():
            row = {"id": identifier, "name": name, "captions": captions}
            for key, (_, above, below, _) in MEASURES.items():
                row[key] = round(values[above] / values[below], 6) if values[below] else None
            yield {**row, "hallucinated_objects": hallucinated}


def named_files(text: str) -> dict[str, str]:
    """Name -> path of `NAME=FILE,FILE,...`; a file without a name has its stem. Raises UserError for a repeated name."""
    files: dict[str, str] = {}
    for item in text.split(","):
        name, equals, path = item.partition("=")
        if not equals or Path(item).is_file():
            name, path = Path(item).stem, item
        if not name or name in files:
            raise UserError(f"--data_path has two files called {name!r}. Fix: name them, NAME=FILE,OTHER=FILE")
        files[name] = path
    return files


def notes(
    yardstick: Yardstick, measured: dict[str, MeasuredFile], part: str, paired: dict[str, Any] | None
) -> list[str]:
    """What a reader of the table has to know, a line each."""
    lines = [f"Measured: {'the final description' if part == 'final' else 'all steps'} of each caption."]
    lines.append("In brackets: 95% intervals.")
    if paired:
        lines.append(f"The last column: on the {paired['images']:,} images that both files have.")
    if yardstick.vocabulary is not None:
        present = "is listed or named by a reference" if yardstick.lists else "a reference names"
        lines.append(f"Objects: {yardstick.vocabulary.objects:,} in the vocabulary; present is what {present}.")
    if yardstick.unknown:
        more = f" and {len(yardstick.unknown) - 10:,} more" if yardstick.unknown[10:] else ""
        lines.append(f"Listed but not in the vocabulary, so not looked for: {', '.join(yardstick.unknown[:10])}{more}.")
    for name, file in measured.items():
        for value, missing in (("with_objects", "list of objects"), ("with_references", "reference caption")):
            without = sum(not image.values[value] for image in file.images.values())
            if 0 < without < len(file.images):
                lines.append(f"{name}: {without:,} of {len(file.images):,} images have no {missing}.")
        if file.rejected:
            first = f"the first, {file.rejected[0]['id']!r}: {file.rejected[0]['reason']}"
            lines.append(f"{name}: {len(file.rejected):,} records are left out; {first}.")
    return lines


def read_vocabulary(path: str) -> list[list[str]]:
    try:
        rows = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise fail(path, f"is no UTF-8 text ({error.reason})", "save it as UTF-8") from error
    return [[name.strip().lower() for name in row.split(",") if name.strip()] for row in rows if row.strip(" ,")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.captions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_path", required=True, help="captions: FILE or NAME=FILE, comma-separated, baseline first"
    )
    parser.add_argument("--references", help="true captions, .json or .jsonl")
    parser.add_argument("--objects", help="objects of every image, .json")
    parser.add_argument("--vocabulary", help="names to look for, a text file; default: all listed objects")
    parser.add_argument("--part", choices=("final", "whole"), default="final", help="of a caption in steps")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="read and match everything, write nothing")
    arguments = parser.parse_args()
    if not arguments.references and not arguments.objects:
        raise UserError("there is nothing to compare with. Fix: give --references or --objects, or both")
    files, part = named_files(arguments.data_path), arguments.part
    truth = read_truth(arguments.references, arguments.objects)
    yardstick = Yardstick(truth, read_vocabulary(arguments.vocabulary) if arguments.vocabulary else None, part)
    if arguments.dry_run:
        measured = {name: measure_file(path, yardstick) for name, path in files.items()}
        for name, file in measured.items():
            captions = sum(image.captions for image in file.images.values())
            print(f"{name:12} {len(file.images):,} images, {captions:,} captions")
        print("".join(f"- {remark}\n" for remark in notes(yardstick, measured, part, None)), end="")
        print(f"writes       {arguments.output_dir}/captions.json (nothing was written)")
        return
    identity = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "dry_run")}
    inputs = [path for path in (arguments.references, arguments.objects, arguments.vocabulary) if path]
    with open_run(arguments.output_dir, "caption quality", identity, [*files.values(), *inputs]) as run:
        output = run.folder / "captions.json"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        from llava.eval.report import markdown

        measured = {name: measure_file(path, yardstick) for name, path in files.items()}
        results = {name: summary(file, arguments.seed) for name, file in measured.items()}
        ends = list(measured.values())
        paired = difference(ends[0], ends[-1], arguments.seed) if len(ends) > 1 else None
        remarks = notes(yardstick, measured, part, paired)
        text = markdown(table(results, paired)) + "\n" + "".join(f"- {remark}\n" for remark in remarks)
        write_records(run.folder / "per_image.jsonl", image_rows(measured))
        rejected = [row for file in ends for row in file.rejected]
        write_records(rejected_path(output), rejected)
        write_atomically(run.folder / "captions.md", [text])
        write_json(output, {"part": part, "names": results, "last_minus_first": paired, "notes": remarks})
        print(text)
        counts = {key: sum(result[key] for result in results.values()) for key in ("images", "captions", "rejected")}
        run.finish(output, files=len(files), **counts)


if __name__ == "__main__":
    run_command(main)
