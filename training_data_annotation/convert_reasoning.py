"""LLaVA-CoT's tagged answers -> structured chain-of-thought and short answers (step 1, reasoning).

    reads   records whose gpt turns hold <SUMMARY>, <CAPTION>, <REASONING>, <CONCLUSION>
    writes  <output_cot_dir>/cot.jsonl      question asking for steps -> four headed steps
            <output_short_dir>/short.jsonl  question as it was -> the conclusion alone
            cot.rejected.jsonl              rows with a missing or empty tag

`<image>` is put in front of the first question where the source has none, as LLaVA-CoT's records do.
"""

import argparse
from pathlib import Path

from llava.errors import UserError, run_command
from llava.ids import read_unique
from llava.prompts import (
    COT_HEADINGS,
    FormatError,
    ask_for_steps,
    render_steps,
    tags_to_steps,
    with_image,
    without_image,
)
from llava.records import Record, images_of, messages_of, rejected_path, rejection, write_records
from llava.runs import open_run


def convert(record: Record) -> tuple[Record, Record]:
    """The CoT record and the short-answer record. Raises FormatError for a missing tag."""
    cot, short = [], []
    for message in messages_of(record):
        if message["role"] == "user":
            images = 0 if cot else len(images_of(record))
            question = without_image(message["content"])
            cot.append({"from": "human", "value": with_image(ask_for_steps(question), images)})
            short.append({"from": "human", "value": with_image(question, images)})
        elif message["role"] == "assistant":
            steps = tags_to_steps(message["content"])
            cot.append({"from": "gpt", "value": render_steps(COT_HEADINGS, steps)})
            short.append({"from": "gpt", "value": steps[-1]})
    speakers = [message["role"] for message in messages_of(record)]
    if speakers != ["user", "assistant"] * (len(speakers) // 2) or not speakers:
        raise FormatError(f"speakers are {', '.join(speakers)}; human and gpt must alternate, human first")
    kept = {key: value for key, value in record.items() if key not in ("id", "conversations")}
    lineage = {"stage": "convert", "source": record["id"]}

    def build(suffix: str, turns: list[dict[str, str]]) -> Record:
        return {"id": f"{record['id']}-{suffix}", **kept, "conversations": turns, "lineage": lineage}

    return build("cot", cot), build("short", short)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training_data_annotation.convert_reasoning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", required=True, help="tagged records (.json, .jsonl)")
    parser.add_argument("--output_cot_dir", required=True, help="run folder; gets cot.jsonl")
    parser.add_argument("--output_short_dir", required=True, help="gets short.jsonl; may be the same folder")
    parser.add_argument("--dry_run", action="store_true", help="convert in memory, write nothing")
    arguments = parser.parse_args()

    records = list(read_unique(arguments.data_path))
    if not records:
        raise UserError(f"{arguments.data_path} holds no records. Fix: check the path")
    converted, rejected = [], []
    for record in records:
        try:
            converted.append(convert(record))
        except FormatError as error:
            rejected.append(rejection(record, str(error)))
    if not converted:
        raise UserError(
            f"no record has LLaVA-CoT's tags; the first: {rejected[0]['reason']}. Fix: check ORIGINAL_COT_FILE"
        )
    output = Path(arguments.output_cot_dir) / "cot.jsonl"
    if arguments.dry_run:
        print(f"records      {len(records):,}: {len(converted):,} convertible, {len(rejected):,} not")
        print(f"writes       {output}, {arguments.output_short_dir}/short.jsonl (nothing was written)")
        return
    identity = {"data_path": arguments.data_path, "output_short_dir": arguments.output_short_dir}
    with open_run(arguments.output_cot_dir, "convert reasoning", identity, [arguments.data_path]) as run:
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        write_records(output, (cot for cot, _ in converted))
        write_records(Path(arguments.output_short_dir) / "short.jsonl", (short for _, short in converted))
        write_records(rejected_path(output), rejected)
        run.finish(output, **{"in": len(records), "out": len(converted), "rejected": len(rejected)})


if __name__ == "__main__":
    run_command(main)
