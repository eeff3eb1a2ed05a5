"""Pool candidates by id, score their agreement, keep the best of each record where they agree enough (step 3).

reads   any number of candidate files: records with `candidates` (texts, or objects with `text`), or with one
        `generated_caption` / `generated_thought`; pooled by id
writes  scored.jsonl      every record with all candidates, their scores and the decision
        chosen.jsonl      training records: the instruction, the whole winning candidate
        chosen_0.85.jsonl ... the same for further thresholds
        preference.jsonl  prompt, chosen, rejected for every kept record whose candidates differ
        curated.rejected.jsonl  records that could not be judged, with the reason
"""

import argparse
from pathlib import Path

from llava.errors import UserError, run_command
from llava.runs import join_run, open_run, rank, world_size
from quality_evaluation.pool import pool

KINDS = ("caption", "reasoning")
SCORES = ("mean_cosine", "leave_one_out", "vote")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m quality_evaluation.curate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--candidates", nargs="+", required=True, help="candidate files to pool by id")
    parser.add_argument("--kind", required=True, help="caption or reasoning: which part of a text is compared")
    parser.add_argument("--output_dir", required=True, help="run folder to write")
    parser.add_argument(
        "--threshold", required=True, help="keep a record when its best score reaches this; further ones after commas"
    )
    parser.add_argument(
        "--score", default="mean_cosine", help=f"{', '.join(SCORES)} (default: mean_cosine, as published)"
    )
    parser.add_argument(
        "--encoder", default="hashing", help="hashing, a sentence-transformers folder, or an embeddings server's URL"
    )
    parser.add_argument("--encoder_model", default="", help="the server's name for its model")
    parser.add_argument("--encoder_preset", default="", help="nv-embed-v2: end each text as published")
    parser.add_argument(
        "--max_tokens", type=int, help="cut texts for the encoder (published: 1024 captions, 512 answers)"
    )
    parser.add_argument("--cache_dir", help="where embeddings are kept by content (default: in the run folder)")
    parser.add_argument("--matrix", action="store_true", help="write all similarities of a record's candidates too")
    parser.add_argument(
        "--multi_turn", action="store_true", help="the question once more, answered in steps and directly"
    )
    parser.add_argument("--parquet", action="store_true", help="write scored.parquet too (needs pyarrow)")
    parser.add_argument("--allow_cut_off", action="store_true", help="use candidates cut off at max_new_tokens too")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn rejected candidates")
    parser.add_argument("--dry_run", action="store_true", help="pool and count, write nothing")
    arguments = parser.parse_args()
    for name, value, known in (("kind", arguments.kind, KINDS), ("score", arguments.score, SCORES)):
        if value not in known:
            raise UserError(f"--{name} is {value!r}; choose one of {', '.join(known)}")
    try:
        arguments.thresholds = [float(part) for part in arguments.threshold.split(",")]
    except ValueError:
        raise UserError(f"--threshold is {arguments.threshold!r}; give a number, or several with commas") from None
    if len(set(arguments.thresholds)) < len(arguments.thresholds):
        raise UserError(f"--threshold {arguments.threshold} names a threshold twice")
    twice = [path for path in arguments.candidates if arguments.candidates.count(path) > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; its candidates would agree with themselves. Fix: name it once")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.dry_run:
        count_candidates(arguments)
        return
    free = ("output_dir", "dry_run", "cache_dir", "thresholds")
    identity = {key: value for key, value in vars(arguments).items() if key not in free}
    identity["threshold"] = arguments.thresholds[0] if len(arguments.thresholds) == 1 else arguments.thresholds
    stage, inputs = f"curate {arguments.kind}", list(arguments.candidates)
    if Path(arguments.encoder).is_dir():
        inputs.append(arguments.encoder)
    from quality_evaluation.judging import curate, encode_share

    folder = Path(arguments.output_dir)
    shared = world_size() > 1 and arguments.encoder != "hashing" and arguments.score != "vote"
    if rank() != 0:
        if shared and not join_run(folder, stage, identity, inputs):
            encode_share(arguments, folder)
        return
    with open_run(folder, stage, identity, inputs) as run:
        output = folder / "chosen.jsonl"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        counts = curate(arguments, folder)
        if arguments.parquet:
            from quality_evaluation.outputs import write_parquet

            write_parquet(folder / "scored.jsonl", folder / "scored.parquet")
        run.finish(output, **counts)


def count_candidates(arguments: argparse.Namespace) -> None:
    """The dry run."""
    numbers = [
        (len(record["candidates"]), left_out)
        for record, left_out in pool(arguments.candidates, arguments.allow_cut_off)
    ]
    enough = sum(count > 1 for count, _ in numbers)
    total, left_out = (sum(column) for column in zip(*numbers, strict=True)) if numbers else (0, 0)
    if not enough:
        raise UserError(
            f"no record in {', '.join(arguments.candidates)} has two usable candidates ({left_out} are empty or cut "
            "off). Fix: pool several runs, raise N_CANDIDATES or MAX_NEW_TOKENS"
        )
    print(f"records      {len(numbers):,} with {total:,} candidates, {left_out:,} empty or cut off and left out")
    print(f"judges       {enough:,}; {len(numbers) - enough:,} have fewer than two candidates")
    print(f"writes       {arguments.output_dir}/chosen.jsonl (nothing was written)")


if __name__ == "__main__":
    run_command(main)
