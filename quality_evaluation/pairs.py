"""Preference pairs for DPO from up to three sources, checked one by one, each with its lineage (paper, DPO variants).

    MODEL_PATH=model_weight/reasoning DATA_PATH=runs/x/annotated/cot/cot.jsonl IMAGE_FOLDER=images PROMPT=cot-default \\
        AUGMENT_METHODS=gaussian_blur,mask OUTPUT_DIR=runs/x/noisy bash recap_scripts/reasoning_inference.sh
    python -m quality_evaluation.pairs --annotated runs/x/annotated/cot/cot.jsonl \\
        --corrupted runs/x/noisy/candidates.jsonl --curated runs/x/curated/captions \\
        --image_folder images --output_dir runs/x/pairs

(PROMPT=default asks each record's own question, which is what cod.jsonl wants.)

corrupted  prompt and chosen are the first question and answer of an annotated record; rejected is drawn (--seed) among the
           answers generated for the corrupted image of the record with the same id, else of the one it was annotated from
curated    a curation's preference.jsonl as it is: the candidate that agrees best, and one of the lower half
triples    files of others: prompt, chosen, rejected as strings or chat messages; see triples.py

reads   annotated records and candidates, curation folders, triples
writes  pairs.jsonl           id, image, prompt, chosen, rejected, source, lineage
        pairs.rejected.jsonl  id of the source record and why it gave no pair

A pair is called after its record and source, `ID-corrupted`, and from the second on `ID-corrupted-2`, in order of the files.
Its lineage names the source file and id, and for each side who wrote it: an annotation's or a candidate's own lineage.
Images keep their names; training needs the same image folder. Whatever else chosen and rejected differ in is learned too,
so their lengths are compared, and pairs counted whose rejected answer was given to another instruction.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import UserError, run_command
from llava.ids import IdSet, read_unique
from llava.images import ImageError, find_image
from llava.pairs import pair_problem
from llava.prompts import without_image
from llava.records import Record, dump, images_of, messages_of, rejection
from llava.runs import open_run
from llava.seeds import seed_of
from quality_evaluation.outputs import Outputs
from quality_evaluation.pool import CandidateFile, joined
from quality_evaluation.triples import read_triples

SOURCES = ("corrupted", "curated", "triples")
SIDES = ("chosen", "rejected")
NO_ANSWERS, NO_IMAGE = "no candidates under its id", "an image file is missing"
FIXES = {
    NO_ANSWERS: "generate --corrupted with DATA_PATH the annotated file, so that the ids are the same",
    NO_IMAGE: "--image_folder, the root of all image paths",
}


def pair_of(record: Record, source: str, file: str, chosen: Record, rejected: Record, **more: Any) -> Record:
    """A pair as it is offered, still with its record's id; `chosen` and `rejected` say who wrote these sides."""
    sides = {"prompt": record["prompt"], "chosen": record["chosen"], "rejected": record["rejected"]}
    image = {"image": record["image"]} if images_of(record) else {}
    lineage = {"stage": "pairs", "source": record["id"], "file": file, **more, "chosen": chosen, "rejected": rejected}
    return {"id": record["id"], **image, **sides, "source": source, "lineage": lineage}


def refused(record: Record, source: str, file: str, reason: str, **details: Any) -> Record:
    return rejection(record, reason, source=source, file=file, **details)


def from_corrupted(arguments: argparse.Namespace, read: Counter) -> Iterator[Record]:
    """Pairs of annotated answers and answers to corrupted images; rows with a `reason` for records without one."""
    files = [CandidateFile(path) for path in arguments.corrupted]
    try:
        for path in arguments.annotated:
            for record in read_unique(path):
                read["corrupted"] += 1
                yield from pairs_of_annotated(record, path, files, arguments)
    finally:
        for file in files:
            file.close()


def pairs_of_annotated(
    record: Record, path: str, files: list[CandidateFile], arguments: argparse.Namespace
) -> Iterator[Record]:
    """As many pairs of one annotated record as are asked for, or why there is none."""
    said = [message for message in messages_of(record) if message["role"] != "system"][:2]
    if [message["role"] for message in said] != ["user", "assistant"]:
        yield refused(record, "corrupted", path, "does not begin with a question and its answer")
        return
    found = answers_for(record, files)
    if not found:
        yield refused(record, "corrupted", path, NO_ANSWERS)
        return
    answered, left_out = joined(found, arguments.allow_cut_off)
    if images_of(answered) != images_of(record):
        details = f"{images_of(record)} is annotated, candidates show {images_of(answered)}"
        yield refused(record, "corrupted", path, "candidates show another image", detail=details)
        return
    noisy = [item for item in answered["candidates"] if item.get("corruption")]
    if not noisy:
        clean = bool(answered["candidates"])
        reason = "no candidate is of a corrupted image" if clean else "every candidate is empty or cut off"
        yield refused(record, "corrupted", path, reason, left_out=left_out)
        return
    sides = {**record, "prompt": said[0]["content"], "chosen": said[1]["content"]}
    writer = record["lineage"] if isinstance(record.get("lineage"), dict) else {}
    for item in drawn(noisy, sides["chosen"], record["id"], arguments):
        by = {"origin": "candidate", "record": answered["id"], **without_text(item)}
        yield pair_of({**sides, "rejected": item["text"]}, "corrupted", path, {"origin": "annotation", **writer}, by)


def answers_for(record: Record, files: list[CandidateFile]) -> list[tuple[str, Record]]:
    """(file, record with candidates) of this id, else of the id that the record was annotated from."""
    lineage = record.get("lineage")
    source = lineage.get("source") if isinstance(lineage, dict) else None
    for identifier in (record["id"], source):
        found = [(file.path, file.find(identifier)) for file in files if isinstance(identifier, str)]
        if answers := [(path, answered) for path, answered in found if answered is not None]:
            return answers
    return []


def drawn(candidates: list[Record], chosen: str, identifier: str, arguments: argparse.Namespace) -> list[Record]:
    """Candidates in random order, each text once, none that says what is chosen; where all do, the first of these."""
    by_text: dict[str, Record] = {}
    for item in candidates:
        by_text.setdefault(item["text"].strip(), item)
    unlike = [item for text, item in by_text.items() if text != chosen.strip()]
    random.Random(seed_of(arguments.seed, identifier, "rejected")).shuffle(unlike)
    return unlike[: arguments.max_per_record] or candidates[:1]


def without_text(candidate: Record) -> Record:
    return {key: value for key, value in candidate.items() if key != "text"}


def from_curated(arguments: argparse.Namespace, read: Counter) -> Iterator[Record]:
    """A curation's pairs; who wrote the sides is looked up in the scored.jsonl beside."""
    for path in arguments.curated:
        scored = Path(path).with_name("scored.jsonl")
        judged = CandidateFile(str(scored)) if scored.is_file() else None
        try:
            for number, record in read_triples(path):
                read["curated"] += 1
                if "reason" in record:
                    yield refused(record, "curated", path, record["reason"], row=number)
                    continue
                known = judged.find(record["id"]) if judged else None
                scores = record.get("scores") or [None, None]
                by = [writer_of(known, side, record[side], score) for side, score in zip(SIDES, scores, strict=True)]
                yield pair_of(record, "curated", path, *by)
        finally:
            if judged:
                judged.close()


def writer_of(judged: Record | None, side: str, text: str, score: float | None) -> Record:
    """Model, seed, score and the rest of the candidate that the decision made this side; else its score alone."""
    place = judged["decision"][side] if judged else None
    candidate = judged["candidates"][place] if place is not None else None
    if candidate is None or candidate["text"] != text:
        return {"origin": "candidate", "score": score}
    return {"origin": "candidate", **without_text(candidate)}


def from_triples(arguments: argparse.Namespace, read: Counter) -> Iterator[Record]:
    """Every row of the triple files as it is."""
    for path in arguments.triples:
        for number, record in read_triples(path):
            read["triples"] += 1
            if "reason" in record:
                yield refused(record, "triples", path, record["reason"], row=number)
            else:
                by = {"origin": "triple"}
                yield pair_of(record, "triples", path, by, by, row=number)


def asked_otherwise(pair: Record) -> bool:
    """Whether the rejected answer was given to another instruction than the pair's."""
    asked = pair["lineage"]["rejected"].get("instruction")
    return asked is not None and without_image(asked) != without_image(pair["prompt"])


class Tally:
    """What came in and out: records read and pairs by source, refused rows by reason, words of both sides."""

    def __init__(self):
        self.read, self.pairs, self.reasons, self.words = Counter(), Counter(), Counter(), Counter()
        self.details: dict[str, str] = {}  # the first of each reason
        self.longer = self.equal = self.asked_otherwise = 0

    def add(self, row: Record) -> None:
        if "reason" in row:
            self.reasons[row["reason"]] += 1
            self.details.setdefault(row["reason"], row.get("detail", f"record {row['id']!r} of {row['file']}"))
            return
        self.pairs[row["source"]] += 1
        words = {side: len(row[side].split()) for side in SIDES}
        self.words.update(words)
        self.longer += words["chosen"] > words["rejected"]
        self.equal += words["chosen"] == words["rejected"]
        self.asked_otherwise += asked_otherwise(row)

    def counts(self) -> dict[str, int]:
        by = {name: self.pairs[name] for name in SOURCES if self.read[name]}
        total = {"in": self.read.total(), "pairs": self.pairs.total()}
        return {**total, **by, "rejected": self.reasons.total(), "chosen_longer": self.longer}

    def why_nothing(self) -> str:
        if not self.reasons:
            return "the files hold no records. Fix: check the stage that should have written them"
        reason = self.reasons.most_common(1)[0][0]
        fix = FIXES.get(reason, "check the file, or name another")
        return (
            f"no pair came out of {self.read.total():,} records, mostly: {reason} ({self.details[reason]}). Fix: {fix}"
        )

    def show(self) -> None:
        total = self.pairs.total()
        for source, count in self.read.items():
            print(f"{source:<12} {count:,} records, {self.pairs[source]:,} pairs")
        for reason, count in self.reasons.most_common():
            print(f"rejected     {count:,}: {reason}; the first: {self.details[reason]}")
        chosen, rejected = (self.words[side] / total for side in SIDES)
        print(
            f"words        chosen {chosen:.1f}, rejected {rejected:.1f} on average; chosen is longer in "
            f"{self.longer / total:.1%} of the pairs, as long in {self.equal / total:.1%}"
        )
        if self.asked_otherwise:
            print(
                f"careful      in {self.asked_otherwise:,} pairs the rejected answer was given to another instruction; "
                "--same_instruction leaves them out"
            )


def offered(arguments: argparse.Namespace, read: Counter) -> Iterator[Record]:
    """What the sources give, pairs and rows with a `reason`, in order of SOURCES; `read` counts records."""
    yield from from_corrupted(arguments, read)
    yield from from_curated(arguments, read)
    yield from from_triples(arguments, read)


def checked(arguments: argparse.Namespace, tally: Tally) -> Iterator[Record]:
    """Usable pairs under their own ids, and rows with a `reason`; all counted.

    Raises UserError when there is no usable pair.
    """
    names, contents, repeated = IdSet(), IdSet(), Counter()
    for offer in tqdm(offered(arguments, tally.read), desc="pairs", unit="row"):
        row = offer
        if "reason" not in offer:
            problem, detail = what_is_wrong(offer, arguments.image_folder, contents)
            if not problem and arguments.same_instruction and asked_otherwise(offer):
                problem = "the rejected answer was given to another instruction"
            if problem:
                place = {key: offer["lineage"][key] for key in ("row",) if key in offer["lineage"]}
                row = refused(offer, offer["source"], offer["lineage"]["file"], problem, **place, **detail)
            else:
                row = {**offer, "id": own_id(offer, names, repeated)}
        tally.add(row)
        yield row
    if not tally.pairs:
        raise UserError(tally.why_nothing())


def what_is_wrong(pair: Record, folder: str, contents: IdSet) -> tuple[str, Record]:
    """Why a pair is unusable and details about it; '' for a usable one."""
    if problem := pair_problem(pair):
        return problem[0], {}
    try:
        for name in images_of(pair):
            find_image(folder, name)
    except ImageError as error:
        return NO_IMAGE, {"detail": str(error)}
    content = [pair["id"], images_of(pair), *(pair[name].strip() for name in ("prompt", *SIDES))]
    return ("" if contents.add(dump(content)) else "the same pair once more"), {}


def own_id(pair: Record, names: IdSet, repeated: Counter) -> str:
    """`<record>-<source>`, and with a number behind it from the second on; no two pairs can get the same."""
    name = f"{pair['id']}-{pair['source']}"
    if names.add(name):
        return name
    repeated[name] += 1
    return f"{name}-{repeated[name] + 1}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotated", nargs="+", default=[], help="records whose answers are good, with --corrupted")
    parser.add_argument("--corrupted", nargs="+", default=[], help="candidates.jsonl generated with AUGMENT_METHODS")
    parser.add_argument("--curated", nargs="+", default=[], help="curation folders, or their preference.jsonl")
    parser.add_argument("--triples", nargs="+", default=[], help="files of prompt, chosen, rejected")
    parser.add_argument("--image_folder", help="root of all images (default: the first file's own folder)")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--max_per_record", type=int, default=1, help="pairs of an annotated record (default: 1)")
    parser.add_argument("--same_instruction", action="store_true", help="both sides must answer the same instruction")
    parser.add_argument("--allow_cut_off", action="store_true", help="use answers cut off at max_new_tokens too")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn rejected answers (default: 0)")
    parser.add_argument("--dry_run", action="store_true", help="check and count, write nothing")
    arguments = parser.parse_args()
    if bool(arguments.annotated) != bool(arguments.corrupted):
        raise UserError("--annotated and --corrupted need each other. Fix: give both, or neither")
    if arguments.max_per_record < 1:
        raise UserError(f"--max_per_record is {arguments.max_per_record}. Fix: 1 or more")
    arguments.curated = [
        str(Path(path) / "preference.jsonl") if Path(path).is_dir() else path for path in arguments.curated
    ]
    files = [*arguments.annotated, *arguments.corrupted, *arguments.curated, *arguments.triples]
    if not files:
        raise UserError("no source is given. Fix: --annotated and --corrupted, --curated, or --triples")
    for path in files:
        if not Path(path).is_file():
            raise UserError(f"{path} is no file. Fix: check the path and the stage that should have written it")
        if files.count(path) > 1:
            raise UserError(f"{path} is given twice. Fix: name it once")
    arguments.image_folder = arguments.image_folder or str(Path(files[0]).parent)
    arguments.files = files
    return arguments


def main() -> None:
    arguments = parse()
    tally = Tally()
    output = Path(arguments.output_dir) / "pairs.jsonl"
    if arguments.dry_run:
        for _ in checked(arguments, tally):
            pass
        tally.show()
        print(f"writes       {output} (nothing was written)")
        return
    free = ("output_dir", "dry_run", "files")
    identity = {key: value for key, value in vars(arguments).items() if key not in free}
    scored = [str(Path(path).with_name("scored.jsonl")) for path in arguments.curated]
    inputs = [*arguments.files, *(path for path in scored if Path(path).is_file())]
    with open_run(arguments.output_dir, "pairs", identity, inputs) as run:
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        with Outputs(run.folder, ["pairs", "pairs.rejected"]) as out:
            for row in checked(arguments, tally):
                out.write(row, "pairs.rejected" if "reason" in row else "pairs")
        tally.show()
        run.finish(output, **tally.counts())


if __name__ == "__main__":
    run_command(main)
