"""Captioned records -> Chain-of-Description and direct-description training records, through a chat endpoint (step 1).

    reads   records: `id`, `image`, first human turn, and the known caption (`caption`, else the gpt turn)
    writes  <output_cod_dir>/cod.jsonl  question + " Describe the image step-by-step." -> all five steps
            <output_dd_dir>/dd.jsonl    question -> the text of step 5
            cod.rejected.jsonl          rows without a usable answer, with the reason and the raw reply

Every reply is kept in <output_cod_dir>/replies.jsonl the moment it arrives; a restarted run pays for none of them again.
"""

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.ids import read_unique
from llava.prompts import (
    ANNOTATOR_SYSTEM,
    COD_HEADINGS,
    DESCRIBE_STEPS,
    PUBLISHED_DESCRIBE_STEPS,
    FormatError,
    annotator_request,
    check_steps,
    render_steps,
    with_image,
    without_image,
)
from llava.records import (
    Record,
    RecordAppender,
    RecordError,
    images_of,
    messages_of,
    question_of,
    read_jsonl,
    rejected_path,
    rejection,
    write_records,
)
from llava.runs import open_run

ASK_AGAIN = "no usable answer"  # reasons that begin so are asked again by a later run
TOO_MANY = 50  # failed answers in a row after which the annotator is taken to be broken
ATTEMPTS = 2  # a reply without the five steps is asked for once more


def known_caption(record: Record) -> str:
    """The caption the annotator gets as a hint: the `caption` field, else what the assistant says."""
    if isinstance(record.get("caption"), str) and record["caption"].strip():
        return record["caption"]
    return next((m["content"] for m in messages_of(record) if m["role"] == "assistant"), "")


async def annotate(record: Record, folder: str, endpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """One finished row: id and tokens used, with `steps`, or with `reason`."""
    from llava.endpoint import Refused, image_part
    from llava.images import ImageError, find_image

    names = images_of(record)
    used = {"prompt_tokens": 0, "completion_tokens": 0}
    if len(names) != 1:
        return rejection(record, f"has {len(names)} images; annotation wants one", **used)
    try:
        image = await asyncio.to_thread(image_part, find_image(folder, names[0]))
        request = annotator_request(question_of(record), known_caption(record))
    except (ImageError, RecordError) as error:
        return rejection(record, str(error), **used)
    messages = [
        {"role": "system", "content": ANNOTATOR_SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": request}, image]},
    ]
    reason, raw = "", None
    for _ in range(ATTEMPTS):
        try:
            [reply] = await endpoint.ask(messages, **settings)
        except Refused as error:
            reason = f"{ASK_AGAIN}: {error}"
            continue
        used["prompt_tokens"] += reply.prompt_tokens
        used["completion_tokens"] += reply.completion_tokens
        raw = reply.text
        if reply.finish_reason == "length":
            reason = f"{ASK_AGAIN}: cut off at {settings['max_tokens']} tokens"
            continue
        try:
            return {"id": record["id"], "steps": check_steps(raw, len(COD_HEADINGS)), "model": reply.model, **used}
        except FormatError as error:
            reason = f"answer without the five steps: {error}" if raw else f"{ASK_AGAIN}: it is empty"
    return rejection(record, reason, reply=raw, **used)


def training_records(
    record: Record, row: dict[str, Any], temperature: float, suffix: str = DESCRIBE_STEPS
) -> tuple[Record, Record]:
    """The CoD record and the DD record of one annotated row; `suffix` asks for the steps."""
    question = without_image(question_of(record))
    lineage = {
        "stage": "annotate", "source": record["id"], "model": row["model"], "temperature": temperature,
        "prompt_tokens": row["prompt_tokens"], "completion_tokens": row["completion_tokens"],
    }  # fmt: skip

    def build(kind: str, asked: str, answer: str) -> Record:
        turns = [{"from": "human", "value": with_image(asked)}, {"from": "gpt", "value": answer}]
        return {
            "id": f"{record['id']}-{kind}", "image": record["image"], "conversations": turns, "lineage": lineage,
        }  # fmt: skip

    cod = build("cod", question + suffix, render_steps(COD_HEADINGS, row["steps"]))
    return cod, build("dd", question, row["steps"][-1])


class Budget:
    """What was spent, in the currency of the prices a million tokens; `spent` None: no prices, nothing is limited."""

    def __init__(self, price_input: float | None, price_output: float | None, most: float | None):
        if most is not None and (price_input is None or price_output is None):
            raise UserError("MAX_COST needs prices. Fix: set PRICE_INPUT and PRICE_OUTPUT, per million tokens")
        self.prices, self.most = (price_input or 0.0, price_output or 0.0), most
        self.priced = price_input is not None or price_output is not None
        self.prompt_tokens = self.completion_tokens = 0

    def add(self, row: dict[str, Any]) -> None:
        self.prompt_tokens += row.get("prompt_tokens", 0)
        self.completion_tokens += row.get("completion_tokens", 0)

    @property
    def spent(self) -> float:
        return (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6

    def check(self) -> None:
        """Raises UserError when the budget is used up."""
        if self.most is not None and self.spent >= self.most:
            raise UserError(
                f"the budget is used up: {self.spent:.2f} of {self.most:.2f}. What was paid for is kept. "
                "Fix: raise MAX_COST and run the same command again"
            )

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        return f"{tokens}, cost {self.spent:.2f}" if self.priced else tokens


def ask_all(
    records: list[Record], folder: str, endpoint, settings: dict[str, Any], path: Path, concurrency: int, budget: Budget
) -> None:
    """Annotate what `path` does not hold yet; at most `concurrency` requests are in flight, none beyond the budget."""
    from tqdm import tqdm

    from llava.endpoint import each

    rows = list(read_jsonl(path))
    done = {row["id"] for row in rows if not row.get("reason", "").startswith(ASK_AGAIN)}
    for row in rows:
        budget.add(row)
    failed = 0
    bar = tqdm(total=len(records), initial=len(done), desc="annotate", unit="record")

    def todo() -> Iterator[Record]:
        for record in records:
            if record["id"] not in done:
                budget.check()
                yield record

    with RecordAppender(path, sync_every=1) as replies, bar:

        def keep(record: Record, row: dict[str, Any]) -> None:
            nonlocal failed
            replies.append(row)
            budget.add(row)
            bar.set_postfix_str(str(budget), refresh=False)
            bar.update(1)
            failed = failed + 1 if row.get("reason", "").startswith(ASK_AGAIN) else 0
            if failed == TOO_MANY:
                raise UserError(f"{failed} answers in a row were unusable; the last: {row['reason']}")

        each(todo(), lambda record: annotate(record, folder, endpoint, settings), keep, concurrency)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training_data_annotation.annotate_captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_path", required=True, help="captioned records (.json, .jsonl)")
    parser.add_argument("--image_folder", help="root of the image paths; default: the record file's folder")
    parser.add_argument("--output_cod_dir", required=True, help="run folder; gets cod.jsonl")
    parser.add_argument("--output_dd_dir", required=True, help="gets dd.jsonl; may be the same folder")
    parser.add_argument("--base_url", help="chat-completions endpoint; default: the openai package's")
    parser.add_argument("--model", default="gpt-4o", help="annotator (default: gpt-4o, as in the paper)")
    parser.add_argument("--temperature", type=float, default=0.2, help="(default: 0.2)")
    parser.add_argument("--max_tokens", type=int, default=2048, help="(default: 2048)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests in flight (default: 64)")
    parser.add_argument("--requests_per_minute", type=float, help="never ask more often (default: no limit)")
    parser.add_argument("--price_input", type=float, help="price of a million tokens that are sent")
    parser.add_argument("--price_output", type=float, help="price of a million tokens that come back")
    parser.add_argument("--max_cost", type=float, help="stop asking when this much is spent, earlier calls included")
    parser.add_argument(
        "--published_wording", action="store_true", help='end CoD questions in "step by step.", unlike generation'
    )
    parser.add_argument("--limit", type=int, help="use the first LIMIT records only (35000 in the paper)")
    parser.add_argument("--dry_run", action="store_true", help="check records and images, ask nothing")
    arguments = parser.parse_args()

    records = list(read_unique(arguments.data_path))[: arguments.limit]
    if not records:
        raise UserError(f"{arguments.data_path} holds no records. Fix: check the path")
    folder = arguments.image_folder or str(Path(arguments.data_path).parent)
    if arguments.dry_run:
        check_images(records, folder)
        print(f"records      {len(records):,}, every image found below {folder}")
        print(f"asks         {arguments.model} at {arguments.base_url or 'the default endpoint'}")
        print(
            f"writes       {arguments.output_cod_dir}/cod.jsonl, {arguments.output_dd_dir}/dd.jsonl (nothing was written)"
        )
        return
    identity = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("concurrency", "dry_run", "base_url", "requests_per_minute")
        and "cost" not in key
        and "price" not in key
    }
    with open_run(arguments.output_cod_dir, "annotate captions", identity, [arguments.data_path]) as run:
        output = Path(arguments.output_cod_dir) / "cod.jsonl"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        budget = Budget(arguments.price_input, arguments.price_output, arguments.max_cost)
        from llava.endpoint import Endpoint

        endpoint = Endpoint(arguments.base_url, arguments.model, requests_per_minute=arguments.requests_per_minute)
        settings = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
        replies = run.folder / "replies.jsonl"
        ask_all(records, folder, endpoint, settings, replies, arguments.concurrency, budget)
        rows = {row["id"]: row for row in read_jsonl(replies)}
        kept = [
            training_records(
                record,
                rows[record["id"]],
                arguments.temperature,
                PUBLISHED_DESCRIBE_STEPS if arguments.published_wording else DESCRIBE_STEPS,
            )
            for record in records
            if "steps" in rows[record["id"]]
        ]
        rejected = [row for row in rows.values() if "reason" in row]
        if not kept:
            raise UserError(
                f"no record could be annotated; the first: {rejected[0]['reason']}. Fix: check the annotator"
            )
        write_records(output, (cod for cod, _ in kept))
        write_records(Path(arguments.output_dd_dir) / "dd.jsonl", (dd for _, dd in kept))
        write_records(rejected_path(output), rejected)
        tokens = {"tokens_in": budget.prompt_tokens, "tokens_out": budget.completion_tokens}
        if budget.priced:
            run.state["cost"] = round(budget.spent, 4)
            print(f"[{run.stage}] {budget}")
        run.finish(output, **{"in": len(records), "out": len(kept), "rejected": len(rejected)}, **tokens)


def check_images(records: list[Record], folder: str) -> None:
    from llava.images import find_image

    for record in records:
        for name in images_of(record):
            find_image(folder, name)


if __name__ == "__main__":
    run_command(main)
