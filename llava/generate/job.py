"""A generation job: records in, the same records with `candidates` out; sharded by rank, resumable by id.

    reads   records (`id`, `image`, first human turn)
    writes  candidates.jsonl (records in input order, `candidates` added), candidates.rejected.jsonl, run.json,
            and while running shards/shard-<rank>.jsonl

Rank r of w works on every w-th record. A finished record is appended to the rank's shard at once; a restarted job, with
any number of ranks, skips the ids it finds there. Rank 0 merges when every input is there exactly once or rejected.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava.errors import UserError
from llava.generate.corruption import corrupt
from llava.generate.sampling import Prompt, Sampling, complete
from llava.images import ImageError, find_image, load_image
from llava.model.load import check_checkpoint, load_model, load_processor
from llava.prompts import with_image
from llava.records import (
    Record,
    RecordAppender,
    RecordError,
    images_of,
    question_of,
    read_jsonl,
    read_unique,
    rejected_path,
    rejection,
    write_records,
)
from llava.runs import fingerprint, join_run, local_rank, open_run, rank, world_size
from llava.seeds import seed_of

PATIENCE = 3600  # seconds without a new record before rank 0 stops waiting for the others
WINDOW = 8  # batches that are sorted by length together


@dataclass(frozen=True)
class Job:
    """What to generate. `image_folder` None: the record file's own folder."""

    model_name_or_path: str
    data_path: str
    output_dir: str
    style: str
    n_candidates: int
    sampling: Sampling
    image_folder: str | None = None
    seed: int = 0
    batch_size: int = 8
    corruptions: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """The arguments that determine the output; batch size is not one of them."""
        return {key: value for key, value in asdict(self).items() if key not in ("output_dir", "batch_size")}

    @property
    def images(self) -> str:
        return self.image_folder or str(Path(self.data_path).parent)

    @property
    def output(self) -> Path:
        return Path(self.output_dir) / "candidates.jsonl"


def preflight(job: Job, instruction: Callable[[str, str], str]) -> None:
    """Read every record and image header, show one prompt; writes nothing."""
    processor = load_processor(job.model_name_or_path)
    records = list(read_unique(job.data_path))
    if not records:
        raise UserError(f"{job.data_path} holds no records. Fix: check the stage that should have written it")
    missing = []
    for record in records:
        try:
            if not images_of(record):
                raise ImageError(f"record {record['id']!r} has no image")
            for name in images_of(record):
                find_image(job.images, name)
        except ImageError as error:
            missing.append(str(error))
    if len(missing) == len(records):
        raise UserError(f"no image can be read; the first: {missing[0]}. Fix: set IMAGE_FOLDER")
    text = with_image(instruction(job.style, question_of(records[0])), len(images_of(records[0])))
    print(f"records      {len(records):,}, {len(missing)} with images missing" + (f": {missing[0]}" if missing else ""))
    print(f"candidates   {job.n_candidates} per record, {asdict(job.sampling)}")
    print(f"prompt       {processor.prompt([{'role': 'user', 'content': text}])!r}")
    print(f"writes       {job.output} (nothing was written)")


def run_job(job: Job, stage: str, instruction: Callable[[str, str], str]) -> None:
    """Generate, then merge (rank 0). `instruction(style, question)` is the text asked about the image."""
    shards = Path(job.output_dir) / "shards"
    check_checkpoint(job.model_name_or_path)
    if next(read_unique(job.data_path), None) is None:
        raise UserError(f"{job.data_path} holds no records. Fix: check the stage that should have written it")
    inputs = [job.model_name_or_path, job.data_path]
    if rank() != 0:
        if not join_run(job.output_dir, stage, job.identity(), inputs):
            generate_shard(job, shards, instruction)
        return
    with open_run(job.output_dir, stage, job.identity(), inputs) as run:
        if run.complete:
            print(f"[{stage}] already complete -> {job.output}")
            return
        generate_shard(job, shards, instruction)
        counts = merge(job, shards)
        run.finish(job.output, **counts)


def finished_ids(shards: Path) -> set[str]:
    return {row["id"] for path in shards.glob("shard-*.jsonl") for row in read_jsonl(path)}


def generate_shard(job: Job, shards: Path, instruction: Callable[[str, str], str]) -> None:
    """Work through this rank's records that no shard holds yet."""
    done = finished_ids(shards)
    mine = (record for number, record in enumerate(read_unique(job.data_path)) if number % world_size() == rank())
    todo = [record for record in mine if record["id"] not in done]
    if not todo:
        return
    cuda = torch.cuda.is_available()
    processor = load_processor(job.model_name_or_path)
    model = load_model(job.model_name_or_path, dtype=torch.bfloat16 if cuda else torch.float32)
    model.to(f"cuda:{local_rank()}" if cuda else "cpu").eval()
    model_hash = fingerprint(Path(job.model_name_or_path))
    path = shards / f"shard-{rank():05d}.jsonl"
    tokens, start = 0, time.time()
    bar = tqdm(total=len(todo), desc=f"{job.style} x{job.n_candidates}", unit="record", disable=rank() != 0)
    with RecordAppender(path) as finished, RecordAppender(rejected_path(path)) as rejected, bar:
        for batch in batches(job, todo, processor, instruction, rejected, bar):
            completions = complete(model, processor, [prompt for _, prompt, _ in batch], job.sampling)
            for (record, prompt, corruption), candidates in zip(batch, completions, strict=True):
                shared = {
                    "instruction": instruction(job.style, question_of(record)), "style": job.style,
                    "model": job.model_name_or_path, "model_hash": model_hash, "corruption": corruption,
                    **asdict(job.sampling),
                }  # fmt: skip
                rows = [
                    {**completion.as_dict(), "sample": number, "seed": seed, **shared}
                    for number, (completion, seed) in enumerate(zip(candidates, prompt.seeds, strict=True))
                ]
                finished.append({**record, "candidates": rows})
                tokens += sum(completion.tokens for completion in candidates)
            bar.set_postfix_str(f"{tokens / (time.time() - start):,.0f} tokens/s", refresh=False)
            bar.update(len(batch))


Item = tuple[Record, Prompt, str | None]


def batches(
    job: Job, records: list[Record], processor, instruction, rejected: RecordAppender, bar
) -> Iterator[list[Item]]:
    """Batches of prompts of similar length. A record that cannot be asked about is rejected with its reason."""
    window: list[Item] = []
    for record in records:
        try:
            window.append(prepare(job, record, instruction))
        except (ImageError, RecordError) as error:
            rejected.append(rejection(record, str(error)))
            bar.update(1)
        if len(window) == WINDOW * job.batch_size or record is records[-1]:
            window.sort(key=lambda item: sum(len(processor.image_ids(*image.size)) for image in item[1].images))
            for start in range(0, len(window), job.batch_size):
                yield window[start : start + job.batch_size]
            window = []


def prepare(job: Job, record: Record, instruction) -> Item:
    """The record's prompt with its images decoded (and corrupted, if asked) and one seed per candidate."""
    names = images_of(record)
    if not names:
        raise RecordError(f"record {record['id']!r} has no image")
    images = [load_image(find_image(job.images, name)) for name in names]
    corruption = None
    if job.corruptions:
        corruption, images = corrupt(images, job.corruptions, seed_of(job.seed, record["id"], "corruption"))
    message = with_image(instruction(job.style, question_of(record)), len(images))
    seeds = [seed_of(job.seed, record["id"], job.style, sample) for sample in range(job.n_candidates)]
    return record, Prompt(message, images, seeds), corruption


def wait_for_ranks(shards: Path, wanted: int) -> None:
    """Wait until the shards hold `wanted` lines. Raises UserError when none was added for PATIENCE seconds."""
    last, since = -1, time.time()
    while (lines := sum(count_lines(path) for path in shards.glob("shard-*.jsonl"))) < wanted:
        if lines != last:
            last, since = lines, time.time()
        elif time.time() - since > PATIENCE:
            raise UserError(
                f"{wanted - lines} of {wanted} records are missing below {shards} and no rank has added one for "
                f"{PATIENCE // 60} minutes. Fix: run the same command again"
            )
        time.sleep(2)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def merge(job: Job, shards: Path) -> dict[str, int]:
    """Write candidates.jsonl in input order once every input is in exactly one shard or rejected.

    Raises RecordError when an id is in two shards, which two jobs at once would cause.
    """
    ids = [record["id"] for record in read_unique(job.data_path)]
    wait_for_ranks(shards, len(ids))
    finished: dict[str, Record] = {}
    refused: dict[str, Record] = {}
    for path in sorted(shards.glob("shard-*.jsonl")):
        into = refused if path.name.endswith(".rejected.jsonl") else finished
        for row in read_jsonl(path):
            if row["id"] in finished or row["id"] in refused:
                raise RecordError(
                    f"id {row['id']!r} is in two shards below {shards}. Fix: delete {shards} and run again"
                )
            into[row["id"]] = row
    if not finished:
        reason = next(iter(refused.values()))["reason"]
        shutil.rmtree(shards)  # nothing is worth keeping, so corrected arguments may use the folder
        raise UserError(
            f"none of {len(ids)} records could be asked about; the first: {reason}. Fix: check IMAGE_FOLDER"
        )
    write_records(job.output, (finished[identifier] for identifier in ids if identifier in finished))
    write_records(rejected_path(job.output), (refused[identifier] for identifier in ids if identifier in refused))
    candidates = sum(len(record["candidates"]) for record in finished.values())
    return {"in": len(ids), "out": len(finished), "rejected": len(refused), "candidates": candidates}
