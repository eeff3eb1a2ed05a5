"""A chat-completions client: one image and a text in, one reply out, through the official `openai` package.

Any server that speaks the protocol works (`OPENAI_BASE_URL`). Transport errors, 429 and 5xx are retried by the
package itself with backoff and Retry-After. What a retry cannot mend is told apart: `Refused` concerns one request,
`ServiceDown` the whole run. An error text can never come back as a reply.
"""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from llava.errors import UserError
from llava.images import FORMATS, ImageError

MAX_RETRIES = 6


class Refused(Exception):
    """The server will not answer this request; others may go through."""


class ServiceDown(UserError):
    """No request can succeed now: wrong key, wrong model, or a server that does not answer."""


@dataclass(frozen=True)
class Reply:
    """A reply's text and what it cost in tokens."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int


class ChatClient:
    """Args: model, temperature, max_tokens as the server understands them; timeout in seconds per attempt."""

    def __init__(self, base_url: str | None, model: str, temperature: float, max_tokens: int, timeout: float = 120.0):
        import openai

        key = os.environ.get("OPENAI_API_KEY")
        if not key and not (base_url and is_loopback(base_url)):
            raise UserError(
                "OPENAI_API_KEY is not set. Fix: export it, or point OPENAI_BASE_URL at a server on this machine"
            )
        self.openai = openai
        self.client = openai.OpenAI(base_url=base_url, api_key=key or "none", max_retries=MAX_RETRIES, timeout=timeout)
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens

    def ask(self, system: str, text: str, image: Path) -> Reply:
        """One request. Raises Refused for this request alone, ServiceDown when going on is pointless."""
        content = [
            {"type": "text", "text": text},
            {"type": "image_url", "image_url": {"url": data_url(image)}},
        ]
        try:
            response = self.client.chat.completions.create(
                model=self.model,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                messages=[{"role": "system", "content": system}, {"role": "user", "content": content}],
            )
            choice = response.choices[0]
            finish, reply = choice.finish_reason, choice.message.content
        except (self.openai.AuthenticationError, self.openai.PermissionDeniedError, self.openai.NotFoundError) as error:
            raise ServiceDown(
                f"the annotator refused us: {error}. Fix: check key, model and OPENAI_BASE_URL"
            ) from error
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            raise Refused(str(error)) from error
        except self.openai.APIError as error:
            if (
                isinstance(error, self.openai.APIStatusError) and error.status_code == 413
            ):  # this image is too large; the next may not be
                raise Refused(str(error)) from error
            raise ServiceDown(
                f"the annotator does not answer after {MAX_RETRIES} retries: {error}. Fix: run the same command again later"
            ) from error
        except (ValueError, AttributeError, IndexError, TypeError) as error:  # HTML or broken JSON with status 200
            raise Refused(f"the reply is no chat completion: {error}") from error
        if finish != "stop" or not isinstance(reply, str) or not reply.strip():
            raise Refused(f"finish_reason {finish!r}, content {str(reply)[:80]!r}")
        usage = response.usage
        tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
        return Reply(reply, response.model, *tokens)


def is_loopback(url: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def data_url(path: Path) -> str:
    """The image's own bytes under its true type."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            kind = Image.MIME[image.format]
            image.load()  # verify() lets truncated JPEGs pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be read: {error}") from error
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
