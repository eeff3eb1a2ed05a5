"""A generation job: records in, the same records with `candidates` out; sharded by rank, resumable by id.

    reads   records (`id`, `image`, first human turn)
    writes  candidates.jsonl (records in input order, `candidates` added), candidates.rejected.jsonl, run.json,
            and while running shards/shard-<rank>.jsonl

Rank r of w works on every w-th record. A finished record is appended to the rank's shard at once; a restarted job, with
any number of ranks, skips the ids it finds there. Rank 0 merges when every input is there exactly once or rejected.
Records are read as a stream: what is held of each is 8 bytes while generating and 28 while merging.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.errors import UserError
from llava.generate.candidates import Draw, Prompt, Sampling
from llava.generate.corruption import corrupt
from llava.ids import IdSet, RecordIndex, id_lines, read_unique
from llava.images import ImageError, find_image, load_image
from llava.prompts import with_image
from llava.records import (
    Record,
    RecordAppender,
    RecordError,
    images_of,
    question_of,
    rejected_path,
    rejection,
    write_atomically,
)
from llava.runs import join_run, open_run, rank, world_size
from llava.seeds import seed_of

PATIENCE = 3600  # seconds without a new record before rank 0 stops waiting for the others
READERS = 2  # threads that decode images ahead of the model


@dataclass(frozen=True)
class Job:
    """What to generate.

    Args:
        model: a checkpoint folder, or with `endpoint` the server's name for its model.
        styles: prompt style -> how many candidates are drawn with it.
        templates: the user's own instructions by style name; `{question}` stands for the record's question.
        image_folder: None: the record file's own folder.
        batch_size: records in flight; with an endpoint: requests in flight.
        round: of self-improvement; recorded, and part of the seeds.
        adaptive: stop drawing for a record once its candidates agree this well (mean cosine of the compared parts).
    """

    model: str
    data_path: str
    output_dir: str
    styles: dict[str, int]
    sampling: Sampling
    kind: str = "caption"
    templates: dict[str, str] | None = None
    image_folder: str | None = None
    seed: int = 0
    batch_size: int = 8
    corruptions: tuple[str, ...] = ()
    round: int = 1
    adaptive: float | None = None
    endpoint: str | None = None
    requests_per_minute: float | None = None

    def identity(self) -> dict[str, Any]:
        """The arguments that determine the output; batch size is not one of them."""
        free = ("output_dir", "batch_size", "endpoint", "requests_per_minute")
        return {**{key: value for key, value in asdict(self).items() if key not in free}, "served": bool(self.endpoint)}

    @property
    def images(self) -> str:
        return self.image_folder or str(Path(self.data_path).parent)

    @property
    def output(self) -> Path:
        return Path(self.output_dir) / "candidates.jsonl"

    @property
    def wanted(self) -> int:
        """Candidates a record gets at most."""
        return sum(self.styles.values())

    def instruction(self, style: str, record: Record) -> str:
        """What the model is asked about the record's images, without placeholder."""
        from llava.prompts import caption_instruction, reasoning_instruction, without_image

        question = question_of(record)
        if style in (self.templates or {}):
            return self.templates[style].replace("{question}", without_image(question))
        return (caption_instruction if self.kind == "caption" else reasoning_instruction)(style, question)


@dataclass(frozen=True)
class Item:
    """A record that is ready to be asked about; `order` are all its draws, the first of each style first."""

    record: Record
    prompt: Prompt
    order: list[Draw]
    instructions: list[str]
    corruption: str | None
    files: list[Path]


Finished = list[tuple[Draw, dict[str, Any]]]  # a draw, and the fields that came back for it


def preflight(job: Job) -> None:
    """Read every record and image header, show the prompts; writes nothing."""
    count, missing, first = 0, [], None
    for record in read_unique(job.data_path):
        count += 1
        try:
            if not images_of(record):
                raise ImageError(f"record {record['id']!r} has no image")
            for name in images_of(record):
                find_image(job.images, name)
        except ImageError as error:
            missing.append(str(error))
        first = first or record
    if first is None:
        raise UserError(f"{job.data_path} holds no records. Fix: check the stage that should have written it")
    if len(missing) == count:
        raise UserError(f"no image can be read; the first: {missing[0]}. Fix: set IMAGE_FOLDER")
    print(f"records      {count:,}, {len(missing)} with images missing" + (f": {missing[0]}" if missing else ""))
    print(f"candidates   {job.wanted} per record, {asdict(job.sampling)}")
    processor = None
    if not job.endpoint:
        from llava.model.load import load_processor

        processor = load_processor(job.model)
    for style, number in job.styles.items():
        text = with_image(job.instruction(style, first), len(images_of(first)))
        if processor:
            text = processor.prompt([{"role": "user", "content": text}])
        print(f"prompt       {number} x {style}: {text!r}")
    print(f"asks         {job.model}" + (f" at {job.endpoint}" if job.endpoint else ""))
    print(f"writes       {job.output} (nothing was written)")


def run_job(job: Job, stage: str) -> None:
    """Generate, then merge (rank 0)."""
    shards = Path(job.output_dir) / "shards"
    if not job.endpoint:
        from llava.model.load import check_checkpoint

        check_checkpoint(job.model)
    if next(read_unique(job.data_path), None) is None:
        raise UserError(f"{job.data_path} holds no records. Fix: check the stage that should have written it")
    inputs = [job.data_path] if job.endpoint else [job.model, job.data_path]
    if rank() != 0:
        if not join_run(job.output_dir, stage, job.identity(), inputs):
            generate_shard(job, shards)
        return
    with open_run(job.output_dir, stage, job.identity(), inputs) as run:
        if run.complete:
            print(f"[{stage}] already complete -> {job.output}")
            return
        generate_shard(job, shards)
        counts = merge(job, shards)
        run.finish(job.output, **counts)


def generate_shard(job: Job, shards: Path) -> None:
    """Work through this rank's records that no shard holds yet."""
    done = IdSet(identifier for path in shards.glob("shard-*.jsonl") for identifier, _ in id_lines(path))

    def todo() -> Iterator[Record]:
        for number, record in enumerate(read_unique(job.data_path)):
            if number % world_size() == rank() and record["id"] not in done:
                yield record

    left = sum(1 for _ in todo())
    if not left:
        return
    path = shards / f"shard-{rank():05d}.jsonl"
    tokens, start = 0, time.time()
    title = ", ".join(f"{style} x{count}" for style, count in job.styles.items())
    bar = tqdm(total=left, desc=title, unit="record", disable=rank() != 0)
    with RecordAppender(path) as finished, RecordAppender(rejected_path(path)) as rejected, bar:

        def reject(record: Record, reason: str) -> None:
            rejected.append(rejection(record, reason))
            bar.update(1)

        def keep(item: Item, drawn: Finished) -> None:
            nonlocal tokens
            finished.append({**item.record, "candidates": candidate_rows(job, item, drawn)})
            tokens += sum(row["tokens"] for _, row in drawn)
            bar.set_postfix_str(f"{tokens / (time.time() - start):,.0f} tokens/s", refresh=False)
            bar.update(1)

        items = prepared(job, todo(), reject)
        if job.endpoint:
            from llava.generate.served import ask_all

            ask_all(job, items, keep, reject)
        else:
            from llava.generate.local import generate

            generate(job, items, keep)


def candidate_rows(job: Job, item: Item, drawn: Finished) -> list[dict[str, Any]]:
    """The record's candidates, style by style, each with everything that made it."""
    styles, rows = list(job.styles), []
    place = {draw: number for number, draw in enumerate(item.prompt.draws)}
    for draw, fields in sorted(drawn, key=lambda pair: place[pair[0]]):
        style = styles[draw.message]
        before = sum(list(job.styles.values())[: draw.message])
        rows.append({
            **fields, "sample": place[draw] - before, "seed": draw.seed, "style": style,
            "instruction": item.instructions[draw.message], "corruption": item.corruption, "round": job.round,
            **asdict(job.sampling),
        })  # fmt: skip
    return rows


def prepared(job: Job, records: Iterable[Record], reject: Callable[[Record, str], None]) -> Iterator[Item]:
    """Items in order, their images decoded ahead by threads. A record that cannot be asked about is rejected."""
    with ThreadPoolExecutor(READERS) as readers:
        ahead: deque = deque()
        waiting = iter(records)
        while True:
            while len(ahead) < 2 * job.batch_size and (record := next(waiting, None)) is not None:
                ahead.append((record, readers.submit(prepare, job, record)))
            if not ahead:
                return
            record, future = ahead.popleft()
            try:
                item = future.result()
            except (ImageError, RecordError) as error:
                reject(record, str(error))
                continue
            yield item


def prepare(job: Job, record: Record) -> Item:
    """The record's prompts with its images decoded (and corrupted, if asked) and a seed for every candidate."""
    names = images_of(record)
    if not names:
        raise RecordError(f"record {record['id']!r} has no image")
    files = [find_image(job.images, name) for name in names]
    served_as_they_are = job.endpoint and not job.corruptions  # the server gets the files' own bytes
    images, corruption = [] if served_as_they_are else [load_image(file) for file in files], None
    if job.corruptions:
        corruption, images = corrupt(images, job.corruptions, seed_of(job.seed, record["id"], "corruption"))
    instructions = [job.instruction(style, record) for style in job.styles]
    numbered = [
        (sample, Draw(message, seed_of(job.seed, record["id"], style, sample, job.round)))
        for message, (style, count) in enumerate(job.styles.items())
        for sample in range(count)
    ]
    messages = [with_image(instruction, len(files)) for instruction in instructions]
    order = [draw for _, draw in sorted(numbered, key=lambda pair: pair[0])]
    return Item(
        record, Prompt(images, messages, [draw for _, draw in numbered]), order, instructions, corruption, files
    )


def first_draws(job: Job, item: Item) -> list[Draw]:
    """What is drawn at once: everything, or with `adaptive` two candidates."""
    return item.prompt.draws if job.adaptive is None else item.order[:2]


def further_draws(job: Job, item: Item, drawn: Finished) -> list[Draw]:
    """With `adaptive`: the next draw, while the candidates so far do not agree well enough."""
    if job.adaptive is None or len(drawn) == len(item.order):
        return []
    texts = [row["text"] for _, row in drawn if row["finish_reason"] == "stop" and row["text"]]
    if len(texts) > 1:
        from llava.generate.agreement import agreement

        if agreement(texts, job.kind) >= job.adaptive:
            return []
    return [item.order[len(drawn)]]


def merge(job: Job, shards: Path) -> dict[str, int]:
    """Write candidates.jsonl in input order once every input is in exactly one shard or rejected.

    Raises RecordError when an id is in two shards, which two jobs at once would cause.
    """
    count = sum(1 for _ in read_unique(job.data_path))
    wait_for_ranks(shards, count)
    paths = sorted(shards.glob("shard-*.jsonl"))
    refused = {path for path in paths if path.name.endswith(".rejected.jsonl")}
    index = RecordIndex(paths)

    def ids() -> Iterator[str]:
        return (record["id"] for record in read_unique(job.data_path))

    rejected = write_lines(rejected_path(job.output), index.lines(ids(), refused))
    if rejected == count:
        reason = index.read(index.rows[0])["reason"]
        shutil.rmtree(shards)  # nothing is worth keeping, so corrected arguments may use the folder
        raise UserError(f"none of {count} records could be asked about; the first: {reason}. Fix: check IMAGE_FOLDER")
    candidates = 0

    def kept() -> Iterator[str]:
        nonlocal candidates
        for line in index.lines(ids(), set(paths) - refused):
            candidates += line.count('"finish_reason": ')
            yield line

    out = write_lines(job.output, kept())
    if out + rejected != count:
        raise RecordError(
            f"{count - out - rejected} records are in no shard below {shards}. Fix: run the same command again"
        )
    counts = {"in": count, "out": out, "rejected": rejected, "candidates": candidates}
    if job.adaptive is not None:
        counts["candidates_spared"] = out * job.wanted - candidates
    return counts


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """A file that appears complete or not at all; returns the number of its lines."""
    count = 0

    def counted() -> Iterator[str]:
        nonlocal count
        for line in lines:
            count += 1
            yield line

    write_atomically(path, counted())
    return count


def wait_for_ranks(shards: Path, wanted: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Wait until the shards hold `wanted` lines. Raises UserError when none was added for PATIENCE seconds.

    `meanwhile` is called again and again; what it raises ends the waiting.
    """
    last, since = -1, time.time()
    seen: dict[Path, tuple[int, int]] = {}  # bytes and lines counted so far
    while True:
        for path in shards.glob("shard-*.jsonl"):
            seen[path] = count_lines(path, *seen.get(path, (0, 0)))
        lines = sum(count for _, count in seen.values())
        if lines >= wanted:
            return
        if lines != last:
            last, since = lines, time.time()
        elif time.time() - since > PATIENCE:
            raise UserError(
                f"{wanted - lines} of {wanted} records are missing below {shards} and no rank has added one for "
                f"{PATIENCE // 60} minutes. Fix: run the same command again"
            )
        meanwhile()
        time.sleep(2)


def count_lines(path: Path, offset: int, lines: int) -> tuple[int, int]:
    """Bytes and lines of a growing file, given those up to `offset`."""
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            offset, lines = offset + len(block), lines + block.count(b"\n")
    return offset, lines
