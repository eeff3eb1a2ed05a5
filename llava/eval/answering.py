"""Asking a model a benchmark's questions: greedily, sharded by rank, resumable; from a checkpoint or from a server.

Rank r of w answers every w-th question. An answer is appended to `answers/<benchmark>/shard-<rank>.jsonl` at once; a run
that is started again, with any number of ranks, asks only what no shard holds.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from llava.eval.questions import Row, images_of_row, question_text, read_tsv
from llava.eval.scoring import rule_for
from llava.records import RecordAppender, read_jsonl
from llava.runs import rank, world_size

Keep = Callable[..., None]  # row, answer, and `refused`: why a server gave none
Asked = tuple[Row, str]  # a row, and what the model is asked


class Answerer(Protocol):
    """Answers all rows of a benchmark; `keep` is called with each row and its answer as it comes."""

    def answer(self, asked: list[Asked], images: Callable[[Row], list], keep: Keep) -> None: ...


class LocalModel:
    """A checkpoint on this process's GPU, or the CPU; `batch_size` questions are decoded together."""

    def __init__(self, checkpoint: str, batch_size: int, max_new_tokens: int):
        from llava.generate.candidates import Sampling
        from llava.model.load import open_to_ask

        self.model, self.processor = open_to_ask(checkpoint)
        self.sampling, self.batch_size = Sampling(temperature=0, max_new_tokens=max_new_tokens), batch_size

    def answer(self, asked: list[Asked], images: Callable[[Row], list], keep: Keep) -> None:
        from llava.generate.candidates import Draw, Prompt
        from llava.generate.sampling import stream
        from llava.prompts import with_image

        def prompts() -> Iterator[tuple[int, Prompt]]:
            for number, (row, text) in enumerate(asked):
                shown = images(row)
                yield number, Prompt(shown, [with_image(text, len(shown))], [Draw(0, 0)])

        for number, [(_, completion)] in stream(
            self.model, self.processor, prompts(), self.sampling, rows=self.batch_size
        ):
            keep(asked[number][0], completion.text)


class ServedModel:
    """A model behind a chat-completions server; `batch_size` requests are in flight. What it refuses is kept as such."""

    def __init__(self, url: str, model: str, batch_size: int, max_new_tokens: int):
        self.url, self.model, self.batch_size = url, model, batch_size
        self.settings = {"temperature": 0, "max_tokens": max_new_tokens}

    def answer(self, asked: list[Asked], images: Callable[[Row], list], keep: Keep) -> None:
        from llava.endpoint import Endpoint, Refused, each, image_part

        endpoint = Endpoint(self.url, self.model, timeout=1800)

        async def ask(job: Asked) -> tuple[str, str | None]:
            row, text = job
            parts = [await asyncio.to_thread(image_part, image) for image in images(row)]
            content = [*parts, {"type": "text", "text": text}]
            try:
                [reply] = await endpoint.ask([{"role": "user", "content": content}], **self.settings)
            except Refused as error:
                return "", str(error)
            return reply.text, None

        each(asked, ask, lambda job, answer: keep(job[0], *answer), self.batch_size)


def answer_share(model: Callable[[], Answerer], path: Path, answers: Path) -> None:
    """This rank's share of the questions of the TSV that no shard below `answers` holds yet.

    `model` is called when there is something to ask.
    """
    done = {line["index"] for shard in answers.glob("shard-*.jsonl") for line in read_jsonl(shard)}
    rows = read_tsv(path)
    mine = [row for n, row in enumerate(rows) if n % world_size() == rank() and row["index"] not in done]
    if not mine:
        return
    by_index, short = {row["index"]: row for row in rows}, rule_for(path.stem, rows).short
    with (
        RecordAppender(answers / f"shard-{rank():05d}.jsonl") as shard,
        tqdm(total=len(mine), desc=path.stem, unit="question", disable=rank() != 0) as bar,
    ):

        def keep(row: Row, text: str, refused: str | None = None) -> None:
            shard.append({"index": row["index"], "prediction": text, **({"refused": refused} if refused else {})})
            bar.update()

        asked = [(row, question_text(row, short)) for row in mine]
        model().answer(asked, lambda row: images_of_row(row, by_index, path.parent), keep)


def answers_below(folder: Path) -> tuple[dict[str, str], int]:
    """index -> answer, from all shards, and how many of them a server refused."""
    lines = [line for shard in sorted(folder.glob("shard-*.jsonl")) for line in read_jsonl(shard)]
    return {line["index"]: line["prediction"] for line in lines}, sum("refused" in line for line in lines)
