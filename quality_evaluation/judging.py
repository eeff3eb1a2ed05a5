"""Judging records: scores of their candidates, the decision, and the records that come out of it (step 3)."""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llava.errors import UserError
from llava.ids import number_of
from llava.prompts import final_answer, final_description, parse_steps, with_image
from llava.records import Record, images_of, question_of, rejection
from llava.runs import rank, world_size
from llava.seeds import seed_of
from quality_evaluation.consistency import best, leave_one_out, mean_cosine, pick_rejected, similarities, vote
from quality_evaluation.encoder import open_encoder
from quality_evaluation.outputs import Outputs
from quality_evaluation.pool import pool

DIRECTLY = "Now say it directly, without the steps."
CHUNK = 512  # records encoded together
PATIENCE = 3600  # seconds that rank 0 waits for the others' shares


def judge(record: Record, scores: np.ndarray, threshold: float, seed: int, matrix: np.ndarray | None) -> Record:
    """The record with a score on every candidate and the decision; `matrix` of similarities, when it is asked for."""
    texts = [item["text"] for item in record["candidates"]]
    scores = scores.astype(np.float64).round(6)  # equal texts tie, and 1 is 1
    winner = best(scores)
    loser = pick_rejected(texts, scores, winner, seed_of(seed, record["id"], "rejected"))
    candidates = [{**item, "score": float(score)} for item, score in zip(record["candidates"], scores, strict=True)]
    decision = {
        "chosen": winner, "rejected": loser, "score": float(scores[winner]), "threshold": threshold,
        "kept": bool(scores[winner] >= threshold),
    }  # fmt: skip
    if matrix is not None:
        decision["similarity"] = matrix.astype(np.float64).round(4).tolist()
    return {**record, "candidates": candidates, "decision": decision}


def training_record(record: Record, multi_turn: str | None = None) -> Record:
    """The SFT record of a judged one: what the winning candidate was asked, and the whole of what it said.

    `multi_turn`, the kind: a caption in steps is followed by a second turn, the request without steps and the final
    description; a response in steps by its answer.
    """
    winner = record["candidates"][record["decision"]["chosen"]]
    asked, said = asked_of(record, winner), winner["text"]
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    if multi_turn:
        turns += second_turn(said, multi_turn)
    return {
        "id": record["id"],
        **{key: record[key] for key in ("image",) if key in record},
        "conversations": turns,
        "lineage": {"stage": "curate", "candidate": winner, "decision": record["decision"]},
    }


def second_turn(said: str, kind: str) -> list[dict[str, str]]:
    """The question once more, answered directly; nothing where no steps were said."""
    direct = final_description(said) if kind == "caption" else final_answer(said)
    if not parse_steps(said) or not direct:
        return []
    return [{"from": "human", "value": DIRECTLY}, {"from": "gpt", "value": direct}]


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


def judged_chunk(records: list[Record], arguments: argparse.Namespace, encoder) -> list[Record]:
    """Judge records together: their texts are encoded at once, and those with equally many candidates scored at once."""
    compared = final_description if arguments.kind == "caption" else final_answer
    texts = [[compared(item["text"]) for item in record["candidates"]] for record in records]
    scores: list[np.ndarray] = [np.empty(0)] * len(records)
    matrices: list[np.ndarray | None] = [None] * len(records)
    if arguments.score == "vote":
        scores = [vote(group) for group in texts]
    else:
        unique = {text: number for number, text in enumerate(dict.fromkeys(text for group in texts for text in group))}
        vectors = encoder.encode(list(unique))
        score = mean_cosine if arguments.score == "mean_cosine" else leave_one_out
        for count in {len(group) for group in texts}:
            rows = [row for row, group in enumerate(texts) if len(group) == count]
            embeddings = gathered(vectors, [[unique[text] for text in texts[row]] for row in rows])
            matrix = similarities(embeddings) if arguments.matrix else [None] * len(rows)
            for row, own, similarity in zip(rows, score(embeddings), matrix, strict=True):
                scores[row], matrices[row] = own, similarity
    return [
        judge(record, own, arguments.thresholds[0], arguments.seed, matrix)
        for record, own, matrix in zip(records, scores, matrices, strict=True)
    ]


def gathered(vectors: np.ndarray, numbers: list[list[int]]) -> np.ndarray:
    """(records, candidates, d) vectors by number; not copied where no text comes twice."""
    if [number for row in numbers for number in row] == list(range(len(vectors))):
        return vectors.reshape(len(numbers), -1, vectors.shape[1])
    return vectors[numbers]


def chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def encode_share(arguments: argparse.Namespace, folder: Path):
    """Encode this rank's share of the texts into the cache, and say that it is done; returns the encoder."""
    encoder = make_encoder(arguments, folder, rank())
    compared = final_description if arguments.kind == "caption" else final_answer
    for chunk in chunks(record for record, _ in pool(arguments.candidates, arguments.allow_cut_off)):
        texts = {compared(item["text"]) for record in chunk for item in record["candidates"]}
        mine = sorted(text for text in texts if number_of(text) % world_size() == rank())
        if mine:
            encoder.encode(mine)
    (encoder.folder / f"done.{rank()}of{world_size()}").touch()
    return encoder


def wait_for_shares(arguments: argparse.Namespace, folder: Path):
    """Rank 0: encode the own share, then wait until the others have encoded theirs; returns the encoder."""
    encoder = encode_share(arguments, folder)
    awaited = [encoder.folder / f"done.{other}of{world_size()}" for other in range(world_size())]
    deadline = time.time() + PATIENCE
    while missing := [path for path in awaited if not path.exists()]:
        if time.time() > deadline:
            raise UserError(f"{len(missing)} ranks have not encoded their share within an hour. Fix: run it again")
        time.sleep(0.2)
    encoder.read_all()
    return encoder


def make_encoder(arguments: argparse.Namespace, folder: Path, number: int):
    return open_encoder(
        arguments.encoder, arguments.encoder_model, arguments.encoder_preset, arguments.max_tokens,
        cache=Path(arguments.cache_dir) if arguments.cache_dir else folder / "embeddings", rank=number,
    )  # fmt: skip


def curate(arguments: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Judge all records in one pass; returns the counts. Every file appears complete or not at all."""
    shared = world_size() > 1 and arguments.encoder != "hashing"
    encoder = None
    if arguments.score != "vote":
        encoder = wait_for_shares(arguments, folder) if shared else make_encoder(arguments, folder, rank())
    counts = dict.fromkeys(("in", "kept", "below_threshold", "rejected", "pairs", "left_out_candidates"), 0)
    names = ["scored", "chosen", "preference", "curated.rejected"]
    extra = {threshold: f"chosen_{threshold:g}" for threshold in arguments.thresholds[1:]}
    counts |= {f"kept_at_{threshold:g}": 0 for threshold in extra}
    with Outputs(folder, [*names, *extra.values()]) as out, tqdm(desc=f"score {arguments.kind}", unit="record") as bar:

        def enough() -> Iterator[Record]:
            for record, left_out in pool(arguments.candidates, arguments.allow_cut_off):
                counts["in"] += 1
                counts["left_out_candidates"] += left_out
                if len(record["candidates"]) > 1:
                    yield record
                else:
                    counts["rejected"] += 1
                    reason = f"{len(record['candidates'])} usable candidates; agreement needs two"
                    out.write(rejection(record, reason), "curated.rejected")

        for chunk in chunks(enough()):
            for record in judged_chunk(chunk, arguments, encoder):
                decision = record["decision"]
                out.write(record, "scored")
                reached = [name for threshold, name in extra.items() if decision["score"] >= threshold]
                for name in reached:
                    counts[name.replace("chosen", "kept_at")] += 1
                counts["kept" if decision["kept"] else "below_threshold"] += 1
                if decision["kept"]:
                    reached.append("chosen")
                if reached:
                    out.write(training_record(record, arguments.kind if arguments.multi_turn else None), *reached)
                if decision["kept"] and decision["rejected"] is not None:
                    counts["pairs"] += 1
                    out.write(preference_record(record), "preference")
            bar.update(len(chunk))
        if counts["in"] == counts["rejected"]:
            raise UserError(
                f"no record in {', '.join(arguments.candidates)} has two usable candidates "
                f"({counts['left_out_candidates']} are empty or cut off). "
                "Fix: pool several runs, raise N_CANDIDATES or MAX_NEW_TOKENS"
            )
    return counts
