"""A chat-completions endpoint: texts and images in, replies out, through the official `openai` package.

Any server that speaks the protocol works. Transport errors, 429 and 5xx are retried by the package itself, with backoff
and Retry-After. What a retry cannot mend is told apart: `Refused` concerns one request, `ServiceDown` the whole run. An
error text can never come back as a reply. Hundreds of requests are in flight in one thread.
"""

import asyncio
import base64
import io
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava.errors import UserError
from llava.images import FORMATS, ImageError

MAX_RETRIES = 6
IN_FLIGHT = 12  # requests a client
Job = TypeVar("Job")
Result = TypeVar("Result")


class Refused(Exception):
    """The server will not answer this request; others may go through."""


class ServiceDown(UserError):
    """No request can succeed now: wrong key, wrong model, or a server that does not answer."""


@dataclass(frozen=True)
class Reply:
    """A reply's text, why it ended, and what the request cost in tokens (its first reply carries the prompt's)."""

    text: str
    finish_reason: str
    model: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """A model on a server. Use it in one event loop, from `each`.

    Args:
        base_url: of the server, ending in /v1; None for the openai package's own (OPENAI_BASE_URL).
        timeout: seconds a try may take.
        requests_per_minute: never sends faster than this; None: as fast as it answers.

    Raises:
        UserError: OPENAI_API_KEY is not set and the server is not on this machine.
    """

    def __init__(
        self, base_url: str | None, model: str, timeout: float = 120.0, requests_per_minute: float | None = None
    ):
        import openai

        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not (base_url and is_loopback(base_url)):
            raise UserError(
                "OPENAI_API_KEY is not set. Fix: export it, or point OPENAI_BASE_URL at a server on this machine"
            )
        self.openai, self.model = openai, model
        self.make = lambda: openai.AsyncOpenAI(
            base_url=base_url, api_key=key or "none", max_retries=MAX_RETRIES, timeout=timeout
        )
        self.idle: list[Any] = []  # clients with room for another request, as often as they have room
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self.next_start = 0.0

    async def ask(self, messages: list[dict[str, Any]], n: int = 1, **settings: Any) -> list[Reply]:
        """One request; at most `n` replies. `settings` as the server understands them (temperature, max_tokens, ...).

        Raises Refused for this request alone, ServiceDown when going on is pointless.
        """
        if n > 1:
            settings["n"] = n
        response = await self.send(
            lambda client: client.chat.completions.create(model=self.model, messages=messages, **settings)
        )
        try:
            usage = response.usage
            tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
            replies = [self.reply(choice, response.model) for choice in response.choices[:n]]
        except (AttributeError, TypeError) as error:
            raise Refused(f"the reply is no chat completion: {error}") from error
        if not replies:
            raise Refused("the reply is no chat completion: it has no choices")
        first = replies[0]
        return [Reply(first.text, first.finish_reason, first.model, *tokens), *replies[1:]]

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text, in order. Raises like `ask`."""
        response = await self.send(lambda client: client.embeddings.create(model=self.model, input=texts))
        try:
            vectors = [row.embedding for row in sorted(response.data, key=lambda row: row.index)]
        except (AttributeError, TypeError) as error:
            raise Refused(f"the reply holds no embeddings: {error}") from error
        if len(vectors) != len(texts) or not all(vectors):
            raise Refused(f"{len(vectors)} embeddings for {len(texts)} texts")
        return vectors

    async def send(self, request: Callable[[Any], Awaitable[Any]]) -> Any:
        """One request through one of the clients, its failure told apart."""
        await self.pace()
        # httpx looks through all connections of a client at every request: many small ones are quicker
        if not self.idle:
            self.idle = [self.make()] * IN_FLIGHT
        client = self.idle.pop()
        try:
            return await request(client)
        except (self.openai.AuthenticationError, self.openai.PermissionDeniedError, self.openai.NotFoundError) as error:
            raise ServiceDown(f"the server refused us: {error}. Fix: check key, model and endpoint") from error
        except self.openai.RateLimitError as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise ServiceDown(
                    f"the account is out of quota: {error}. Fix: top it up, run the same again"
                ) from error
            raise self.down(error) from error
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            raise Refused(str(error)) from error
        except self.openai.APIError as error:
            if isinstance(error, self.openai.APIStatusError) and error.status_code == 413:
                raise Refused(str(error)) from error  # this image is too large; the next may not be
            raise self.down(error) from error
        except ValueError as error:  # HTML or broken JSON with status 200
            raise Refused(f"the reply cannot be read: {error}") from error
        finally:
            self.idle.append(client)

    def reply(self, choice, model: str) -> Reply:
        text = choice.message.content
        if choice.finish_reason not in ("stop", "length") or not isinstance(text, str):
            raise Refused(f"finish_reason {choice.finish_reason!r}, content {str(text)[:80]!r}")
        return Reply(text.strip(), choice.finish_reason, model, 0, 0)

    def down(self, error: Exception) -> ServiceDown:
        return ServiceDown(
            f"the server does not answer after {MAX_RETRIES} retries: {error}. Fix: run the same command again later"
        )

    async def pace(self) -> None:
        """Wait for this request's turn."""
        if self.interval:
            now = time.monotonic()
            self.next_start = max(self.next_start + self.interval, now)
            await asyncio.sleep(self.next_start - now)


def each(
    jobs: Iterable[Job],
    work: Callable[[Job], Awaitable[Result]],
    done: Callable[[Job, Result], None],
    concurrency: int,
) -> None:
    """Work on all jobs, `concurrency` at a time; `done` is called as each one is finished.

    After an exception no new job is taken; those in flight, which are paid for, are finished; then it is raised.
    """

    async def run() -> None:
        waiting, flying, failure = iter(jobs), {}, None
        while True:
            while failure is None and len(flying) < concurrency:
                try:
                    job = next(waiting, flying)  # `flying` stands for: no more
                except BaseException as error:
                    failure = error
                    break
                if job is flying:
                    break
                flying[asyncio.ensure_future(work(job))] = job
            if not flying:
                break
            finished, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                job = flying.pop(task)
                try:
                    done(job, task.result())
                except BaseException as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    asyncio.run(run())


def is_loopback(url: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def image_part(source) -> dict[str, Any]:
    """A message's part for an image: a file's own bytes under their true type, or a PIL image as PNG."""
    return {"type": "image_url", "image_url": {"url": data_url(source)}}


def data_url(source) -> str:
    """Raises ImageError for a file that cannot be decoded to its end."""
    from PIL import Image

    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    try:
        with Image.open(source, formats=FORMATS) as image:
            kind = Image.MIME[image.format]
            image.load()  # verify() lets truncated JPEGs pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {source} cannot be read: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"
