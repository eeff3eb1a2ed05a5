"""Generating through a chat-completions server (vLLM, SGLang, `transformers serve`, any other)."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from llava.endpoint import Endpoint, Refused, Reply, each, image_part
from llava.errors import UserError
from llava.generate.candidates import Draw
from llava.generate.job import Finished, Item, Job, first_draws, further_draws
from llava.records import Record
from llava.runs import world_size


def ask_all(
    job: Job, items: Iterable[Item], keep: Callable[[Item, Finished], None], reject: Callable[[Record, str], None]
) -> None:
    """Draw all candidates of all items, `job.batch_size` records at a time."""
    if job.sampling.num_beams > 1:
        raise UserError("a chat-completions server has no beam search. Fix: BEAMS=1")
    server = Server(job)

    def done(item: Item, drawn: Finished | str) -> None:
        if isinstance(drawn, str):
            reject(item.record, drawn)
        else:
            keep(item, drawn)

    each(items, server.candidates, done, job.batch_size)


class Server:
    """The endpoint, and whether it gives several replies to a request."""

    def __init__(self, job: Job):
        pace = job.requests_per_minute / world_size() if job.requests_per_minute else None
        # a request may wait long in a busy server's queue
        self.job, self.endpoint = job, Endpoint(job.endpoint, job.model, timeout=1800, requests_per_minute=pace)
        sampling = job.sampling
        self.settings: dict[str, Any] = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
        }  # fmt: skip
        if sampling.top_k:
            self.settings["extra_body"] = {"top_k": sampling.top_k}  # not part of the protocol; vLLM and SGLang know it
        self.several = True

    async def candidates(self, item: Item) -> Finished | str:
        """All draws of an item, or why the server refused."""
        images = item.prompt.images if item.corruption else item.files
        try:
            parts = [await asyncio.to_thread(image_part, image) for image in images]
            drawn: Finished = []
            while draws := first_draws(self.job, item) if not drawn else further_draws(self.job, item, drawn):
                by_message: dict[int, list[Draw]] = {}
                for draw in draws:
                    by_message.setdefault(draw.message, []).append(draw)
                asked = [
                    self.draw([*parts, {"type": "text", "text": item.instructions[message]}], own)
                    for message, own in by_message.items()
                ]
                drawn += [pair for pairs in await asyncio.gather(*asked) for pair in pairs]
        except Refused as error:
            return f"refused: {error}"
        return drawn

    async def draw(self, content: list[dict], draws: list[Draw]) -> Finished:
        """Several samples in one request where the server gives them; the rest in a request each."""
        messages = [{"role": "user", "content": content}]
        replies: list[Reply] = []
        if len(draws) > 1 and self.several:
            try:
                replies = await self.endpoint.ask(messages, n=len(draws), seed=draws[0].seed, **self.settings)
                self.several = len(replies) == len(draws)
            except Refused:  # because of `n`, or of this image: one reply alone will tell
                replies = await self.endpoint.ask(messages, seed=draws[0].seed, **self.settings)
                self.several = False
        singly = [self.endpoint.ask(messages, seed=draw.seed, **self.settings) for draw in draws[len(replies) :]]
        replies += [reply for one in await asyncio.gather(*singly) for reply in one]
        return [(draw, self.fields(reply)) for draw, reply in zip(draws, replies, strict=True)]

    def fields(self, reply: Reply) -> dict[str, Any]:
        return {
            "text": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.completion_tokens,
            "prompt_tokens": reply.prompt_tokens, "model": reply.model, "model_hash": None,
            "endpoint": self.job.endpoint,
        }  # fmt: skip
