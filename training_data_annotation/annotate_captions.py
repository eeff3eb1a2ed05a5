"""Captioned records -> Chain-of-Description and direct-description training records, through a chat endpoint (step 1).

    reads   records: `id`, `image`, first human turn, and the known caption (`caption`, else the gpt turn)
    writes  <output_cod_dir>/cod.jsonl  question + " Describe the image step-by-step." -> all five steps
            <output_dd_dir>/dd.jsonl    question -> the text of step 5
            cod.rejected.jsonl          rows without a usable answer, with the reason and the raw reply

Every reply is kept in <output_cod_dir>/replies.jsonl the moment it arrives; a restarted run pays for none of them again.
"""

import argparse
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.prompts import (
    ANNOTATOR_SYSTEM,
    COD_HEADINGS,
    DESCRIBE_STEPS,
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
    read_unique,
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


def annotate(record: Record, folder: str, client) -> dict[str, Any]:
    """One finished row: id with `steps` and usage, or id with `reason`."""
    from llava.images import ImageError, find_image
    from training_data_annotation.client import Refused

    names = images_of(record)
    if len(names) != 1:
        return rejection(record, f"has {len(names)} images; annotation wants one")
    reason, raw = "", None
    for _ in range(ATTEMPTS):
        try:
            reply = client.ask(
                ANNOTATOR_SYSTEM,
                annotator_request(question_of(record), known_caption(record)),
                find_image(folder, names[0]),
            )
            raw = reply.text
            steps = check_steps(reply.text, len(COD_HEADINGS))
            return {
                "id": record["id"], "steps": steps, "model": reply.model,
                "prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens,
            }  # fmt: skip
        except (ImageError, RecordError) as error:
            return rejection(record, str(error))
        except Refused as error:
            reason = f"{ASK_AGAIN}: {error}"
        except FormatError as error:
            reason = f"answer without the five steps: {error}"
    return rejection(record, reason, reply=raw)


def training_records(record: Record, row: dict[str, Any], temperature: float) -> tuple[Record, Record]:
    """The CoD record and the DD record of one annotated row."""
    question = without_image(question_of(record))
    lineage = {
        "stage": "annotate", "source": record["id"], "model": row["model"], "temperature": temperature,
        "prompt_tokens": row["prompt_tokens"], "completion_tokens": row["completion_tokens"],
    }  # fmt: skip

    def build(suffix: str, asked: str, answer: str) -> Record:
        turns = [{"from": "human", "value": with_image(asked)}, {"from": "gpt", "value": answer}]
        return {
            "id": f"{record['id']}-{suffix}", "image": record["image"], "conversations": turns, "lineage": lineage,
        }  # fmt: skip

    cod = build("cod", question + DESCRIBE_STEPS, render_steps(COD_HEADINGS, row["steps"]))
    return cod, build("dd", question, row["steps"][-1])


def ask_all(records: list[Record], folder: str, client, path: Path, concurrency: int) -> None:
    """Annotate what `path` does not hold yet; at most `concurrency` requests are in flight."""
    from tqdm import tqdm

    done = {row["id"] for row in read_jsonl(path) if not row.get("reason", "").startswith(ASK_AGAIN)}
    todo = iter([record for record in records if record["id"] not in done])
    bar = tqdm(total=len(records), initial=len(done), desc="annotate", unit="record")
    with RecordAppender(path, sync_every=1) as replies, ThreadPoolExecutor(concurrency) as pool, bar:
        flying = {pool.submit(annotate, record, folder, client) for record in islice(todo, concurrency)}
        failure: BaseException | None = None
        failed = 0
        while flying:
            finished, flying = wait(flying, return_when=FIRST_COMPLETED)
            for future in finished:
                if future.exception() is None:
                    row = future.result()
                    replies.append(row)
                    bar.update(1)
                    failed = failed + 1 if row.get("reason", "").startswith(ASK_AGAIN) else 0
                    if failed == TOO_MANY:
                        failure = UserError(f"{failed} answers in a row were unusable; the last: {row['reason']}")
                else:
                    failure = failure or future.exception()
                if failure is None:
                    flying |= {pool.submit(annotate, record, folder, client) for record in islice(todo, 1)}
    if failure is not None:  # raised only now: what was in flight is paid for and kept
        raise failure


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
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight (default: 16)")
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
        key: value for key, value in vars(arguments).items() if key not in ("concurrency", "dry_run", "base_url")
    }
    with open_run(arguments.output_cod_dir, "annotate captions", identity, [arguments.data_path]) as run:
        output = Path(arguments.output_cod_dir) / "cod.jsonl"
        if run.complete:
            print(f"[{run.stage}] already complete -> {output}")
            return
        from training_data_annotation.client import ChatClient

        client = ChatClient(arguments.base_url, arguments.model, arguments.temperature, arguments.max_tokens)
        replies = run.folder / "replies.jsonl"
        ask_all(records, folder, client, replies, arguments.concurrency)
        rows = {row["id"]: row for row in read_jsonl(replies)}
        kept = [
            training_records(record, rows[record["id"]], arguments.temperature)
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
        tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows.values() if "steps" in row)
        run.finish(output, **{"in": len(records), "out": len(kept), "rejected": len(rejected), "tokens": tokens})


def check_images(records: list[Record], folder: str) -> None:
    from llava.images import find_image

    for record in records:
        for name in images_of(record):
            find_image(folder, name)


if __name__ == "__main__":
    run_command(main)
