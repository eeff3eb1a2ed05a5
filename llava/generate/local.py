"""Generating with a checkpoint on this machine's GPU, or its CPU."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava.generate.candidates import Completion, Draw
from llava.generate.job import Finished, Item, Job, first_draws, further_draws
from llava.generate.sampling import stream
from llava.model.load import open_to_ask
from llava.runs import fingerprint


def generate(job: Job, items: Iterable[Item], keep: Callable[[Item, Finished], None]) -> None:
    """Draw all candidates of all items; `keep` is called with each item as it is finished."""
    model, processor = open_to_ask(job.model)
    made_by = {"model": job.model, "model_hash": fingerprint(Path(job.model))}

    def rows(drawn: list[tuple[Draw, Completion]]) -> list[tuple[Draw, dict[str, Any]]]:
        return [(draw, {**completion.as_dict(), **made_by}) for draw, completion in drawn]

    def more(item: Item, drawn: list[tuple[Draw, Completion]]) -> list[Draw]:
        return further_draws(job, item, rows(drawn))

    prompts = ((item, replace(item.prompt, draws=first_draws(job, item))) for item in items)
    at_once = job.wanted if job.adaptive is None else min(job.wanted, 2)  # candidates of a record, see `first_draws`
    for item, drawn in stream(model, processor, prompts, job.sampling, job.batch_size * at_once, more):
        keep(item, rows(drawn))
