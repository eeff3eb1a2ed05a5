"""Pool candidates by id, score their agreement, keep the best of each record where they agree enough (step 3).

reads   any number of candidate files: records with `candidates` (texts, or objects with `text`), or with one
        `generated_caption` / `generated_thought`; pooled by id
writes  scored.jsonl      every record with all candidates, their scores and the decision
        chosen.jsonl      training records: the instruction, the whole winning candidate
        preference.jsonl  prompt, chosen, rejected for every kept record whose candidates differ
        curated.rejected.jsonl  records that could not be judged, with the reason
"""

import argparse
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.ids import read_unique
from llava.prompts import final_answer, final_description, with_image
from llava.records import Record, RecordError, images_of, question_of, rejection, write_records
from llava.runs import open_run
from llava.seeds import seed_of

KINDS = ("caption", "reasoning")
SCORES = ("mean_cosine", "leave_one_out", "vote")
CHUNK = 512  # records encoded together


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


def pool(paths: list[str], allow_cut_off: bool = False) -> tuple[list[Record], int]:
    """Records of all files, one per id in order of first appearance, candidates joined; and the number left out.

    Raises RecordError when the same id shows different images in two files.
    """
    pooled: dict[str, Record] = {}
    left_out = 0
    for path in paths:
        for record in read_unique(path):
            found = [item for item in candidates_of(record) if usable(item, allow_cut_off)]
            left_out += len(candidates_of(record)) - len(found)
            if record["id"] not in pooled:
                pooled[record["id"]] = {**record, "candidates": []}
            known = pooled[record["id"]]
            if images_of(known) != images_of(record):
                raise RecordError(
                    f"{path}: id {record['id']!r} shows {images_of(record)}, but {images_of(known)} in an earlier file. "
                    "Fix: pool only runs over the same records"
                )
            for item in found:
                if same_draw(item, known["candidates"]):
                    raise RecordError(
                        f"{path}: id {record['id']!r} has a candidate with the model, prompt and seed of an earlier file. "
                        "Fix: pool runs with different SEED; the same draw twice would agree with itself"
                    )
            known["candidates"] += [{**item, "file": path} for item in found]
    return list(pooled.values()), left_out


def usable(candidate: dict[str, Any], allow_cut_off: bool) -> bool:
    """Not empty, and not cut off at max_new_tokens: a text without its end teaches to stop anywhere."""
    return bool(candidate["text"].strip()) and (allow_cut_off or candidate.get("finish_reason") != "length")


def same_draw(candidate: dict[str, Any], others: list[dict[str, Any]]) -> bool:
    """Whether another candidate was drawn by the same model, prompt and seed."""
    keys = ("model_hash", "style", "seed")
    if any(key not in candidate for key in keys):
        return False
    return any(all(other.get(key) == candidate[key] for key in keys) for other in others)


def judge(record: Record, scores, threshold: float, seed: int) -> Record:
    """The record with a score on every candidate and the decision."""
    from quality_evaluation.consistency import best, pick_rejected

    texts = [item["text"] for item in record["candidates"]]
    scores = scores.round(6)  # equal texts tie, and 1 is 1
    winner = best(scores)
    loser = pick_rejected(texts, scores, winner, seed_of(seed, record["id"], "rejected"))
    candidates = [{**item, "score": float(score)} for item, score in zip(record["candidates"], scores, strict=True)]
    decision = {
        "chosen": winner, "rejected": loser, "score": float(scores[winner]), "threshold": threshold,
        "kept": bool(scores[winner] >= threshold),
    }  # fmt: skip
    return {**record, "candidates": candidates, "decision": decision}


def training_record(record: Record) -> Record:
    """The SFT record of a judged one: what the winning candidate was asked, and the whole of what it said."""
    winner = record["candidates"][record["decision"]["chosen"]]
    return {
        "id": record["id"],
        **{key: record[key] for key in ("image",) if key in record},
        "conversations": [
            {"from": "human", "value": asked_of(record, winner)},
            {"from": "gpt", "value": winner["text"]},
        ],
        "lineage": {"stage": "curate", "candidate": winner, "decision": record["decision"]},
    }


def preference_record(record: Record) -> Record:
    """prompt, chosen, rejected of a judged record; both sides whole."""
    winner = record["candidates"][record["decision"]["chosen"]]
    loser = record["candidates"][record["decision"]["rejected"]]
    return {
        "id": record["id"], **{key: record[key] for key in ("image",) if key in record},
        "conversations": record["conversations"],
        "prompt": asked_of(record, winner), "chosen": winner["text"], "rejected": loser["text"],
        "scores": [winner["score"], loser["score"]],
    }  # fmt: skip


def asked_of(record: Record, candidate: dict[str, Any]) -> str:
    return with_image(candidate.get("instruction") or question_of(record), len(images_of(record)))


def score_all(
    records: list[Record], kind: str, score: str, encoder_name: str, threshold: float, seed: int
) -> list[Record]:
    """Judge every record; texts of `CHUNK` records are encoded together."""
    from tqdm import tqdm

    from quality_evaluation.consistency import leave_one_out, mean_cosine, vote
    from quality_evaluation.encoder import open_encoder

    compared = final_description if kind == "caption" else final_answer
    encoder = None if score == "vote" else open_encoder(encoder_name)
    judged = []
    with tqdm(total=len(records), desc=f"score {kind}", unit="record") as bar:
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            texts = [[compared(item["text"]) for item in record["candidates"]] for record in chunk]
            if encoder:
                vectors = iter(encoder.encode([text for group in texts for text in group]))
            for record, group in zip(chunk, texts, strict=True):
                if encoder:
                    import numpy as np

                    embeddings = np.stack([next(vectors) for _ in group])
                    scores = (mean_cosine if score == "mean_cosine" else leave_one_out)(embeddings)
                else:
                    scores = vote(group)
                judged.append(judge(record, scores, threshold, seed))
            bar.update(len(chunk))
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.curate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--candidates", nargs="+", required=True, help="candidate files to pool by id")
    parser.add_argument("--kind", required=True, help="caption or reasoning: which part of a text is compared")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument("--threshold", type=float, required=True, help="keep a record when its best score reaches this")
    parser.add_argument(
        "--score", default="mean_cosine", help=f"{', '.join(SCORES)} (default: mean_cosine, as published)"
    )
    parser.add_argument("--encoder", default="hashing", help="hashing, or a sentence-transformers folder")
    parser.add_argument("--allow_cut_off", action="store_true", help="use candidates cut off at max_new_tokens too")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn rejected candidates")
    parser.add_argument("--dry_run", action="store_true", help="pool and count, write nothing")
    arguments = parser.parse_args()
    for name, value, known in (("kind", arguments.kind, KINDS), ("score", arguments.score, SCORES)):
        if value not in known:
            raise UserError(f"--{name} is {value!r}; choose one of {', '.join(known)}")

    twice = [path for path in arguments.candidates if arguments.candidates.count(path) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; its candidates would agree with themselves. Fix: name it once")
    pooled, left_out = pool(arguments.candidates, arguments.allow_cut_off)
    enough = [record for record in pooled if len(record["candidates"]) > 1]
    rejected = [
        rejection(record, f"{len(record['candidates'])} usable candidates; agreement needs two")
        for record in pooled
        if len(record["candidates"]) < 2
    ]
    if not enough:
        raise UserError(
            f"no record in {', '.join(arguments.candidates)} has two usable candidates ({left_out} are empty or cut "
            "off). Fix: pool several runs, raise N_CANDIDATES or MAX_NEW_TOKENS"
        )
    if arguments.dry_run:
        total = sum(len(record["candidates"]) for record in pooled)
        print(f"records      {len(pooled):,} with {total:,} candidates, {left_out:,} empty or cut off and left out")
        print(f"judges       {len(enough):,}; {len(rejected):,} have fewer than two candidates")
        print(f"writes       {arguments.output_dir}/chosen.jsonl (nothing was written)")
        return
    identity = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "dry_run")}
    with open_run(arguments.output_dir, f"curate {arguments.kind}", identity, arguments.candidates) as run:
        output = Path(arguments.output_dir) / "chosen.jsonl"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        judged = score_all(
            enough, arguments.kind, arguments.score, arguments.encoder, arguments.threshold, arguments.seed
        )
        kept = [record for record in judged if record["decision"]["kept"]]
        pairs = [record for record in kept if record["decision"]["rejected"] is not None]
        write_records(run.folder / "scored.jsonl", judged)
        write_records(run.folder / "preference.jsonl", map(preference_record, pairs))
        write_records(run.folder / "curated.rejected.jsonl", rejected)
        write_records(output, map(training_record, kept))
        counts = {"in": len(pooled), "kept": len(kept), "below_threshold": len(judged) - len(kept)}
        run.finish(output, **counts, rejected=len(rejected), pairs=len(pairs), left_out_candidates=left_out)


if __name__ == "__main__":
    run_command(main)
