"""What the adapters to other evaluation kits share: a message of texts and images, and who answers it.

A kit's message is a list of parts in order: a string is text, a path or a PIL image an image. A checkpoint reads it as
one user message with `<image>` on a line of its own for every image; a server gets the parts as they are.
"""

import argparse
import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import UserError
from llava.prompts import IMAGE, without_image
from llava.runs import join_run, open_run, rank

if TYPE_CHECKING:
    from PIL import Image

    from llava.generate.candidates import Draw, Prompt

    Part = str | Path | Image.Image
    Answer = Callable[[list[Part]], str]


def arrange(parts: list["Part"]) -> list["Part"]:
    """The parts without `<image>` in their texts and without empty texts.

    Where the texts hold as many `<image>` as there are images, that is where the images go; else they stay in place.

    >>> arrange(["Compare <image> with <image>.", Path("a.png"), Path("b.png")])
    ['Compare', PosixPath('a.png'), 'with', PosixPath('b.png'), '.']
    """
    images = [part for part in parts if not isinstance(part, str)]
    pieces = "\n".join(part for part in parts if isinstance(part, str)).split(IMAGE)
    if images and len(pieces) == len(images) + 1:
        parts = [pieces[0]]
        for image, piece in zip(images, pieces[1:], strict=True):
            parts += [image, piece]
    cleaned = [without_image(part) if isinstance(part, str) else part for part in parts]
    return [part for part in cleaned if not isinstance(part, str) or part]


def prompt_of(parts: list["Part"], draws: list["Draw"]) -> "Prompt":
    """The parts as one prompt for a checkpoint."""
    from llava.generate.candidates import Prompt
    from llava.images import load_image, to_rgb

    images, lines = [], []
    for part in arrange(parts):
        if isinstance(part, str):
            lines.append(part)
        else:
            images.append(load_image(part) if isinstance(part, Path) else to_rgb(part))
            lines.append(IMAGE)
    return Prompt(images, ["\n".join(lines)], draws)


def ask_checkpoint(checkpoint: str, max_new_tokens: int) -> "Answer":
    """A function that answers a message with the checkpoint, greedily."""
    from llava.generate.candidates import Draw, Sampling
    from llava.generate.sampling import complete
    from llava.model.load import open_to_ask

    model, processor = open_to_ask(checkpoint)
    sampling = Sampling(temperature=0, max_new_tokens=max_new_tokens)

    def answer(parts: list["Part"]) -> str:
        [[completion]] = complete(model, processor, [prompt_of(parts, [Draw(0, 0)])], sampling)
        return completion.text

    return answer


def ask_server(base_url: str, model: str, max_new_tokens: int) -> "Answer":
    """A function that answers a message through a chat-completions server, greedily; any thread may call it.

    The function raises Refused for a message the server will not answer, ServiceDown when going on is pointless.
    """
    from llava.endpoint import Endpoint, image_part

    endpoint = Endpoint(base_url, model, timeout=1800)  # a request may wait long in a busy server's queue
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def answer(parts: list["Part"]) -> str:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else image_part(part) for part in arrange(parts)
        ]
        asked = endpoint.ask([{"role": "user", "content": content}], temperature=0, max_tokens=max_new_tokens)
        [reply] = asyncio.run_coroutine_threadsafe(asked, loop).result()
        return reply.text

    return answer


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name_or_path", help="checkpoint folder to evaluate")
    parser.add_argument("--base_url", help="instead of a checkpoint: a chat-completions server, ending in /v1")
    parser.add_argument("--model", help="the model's name on that server")
    parser.add_argument("--work_dir", required=True, help="folder of all evaluations; the model gets one inside")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="(default: 1024)")
    parser.add_argument("--dry_run", action="store_true", help="check, print the command, answer nothing")


def name_of(arguments: argparse.Namespace) -> str:
    """What results are filed under: the checkpoint folder's name, or the served model's."""
    if bool(arguments.model_name_or_path) == bool(arguments.base_url):
        raise UserError("which model? Fix: give either --model_name_or_path, or --base_url and --model")
    if not arguments.base_url:
        return Path(arguments.model_name_or_path).resolve().name
    if not arguments.model:
        raise UserError("--base_url needs --model. Fix: give the name under which the server has the model")
    return arguments.model.replace("/", "--")


def check_model(arguments: argparse.Namespace) -> None:
    """Raises UserError when the checkpoint is none of ours."""
    if arguments.model_name_or_path:
        from llava.model.load import check_checkpoint

        check_checkpoint(arguments.model_name_or_path)


@contextmanager
def model_folder(arguments: argparse.Namespace, stage: str):
    """Hold the model's folder below `work_dir` as a run: answers of another model are never taken up. None on ranks > 0."""
    model = arguments.model_name_or_path or arguments.model
    identity = {"model": model, "served": bool(arguments.base_url), "max_new_tokens": arguments.max_new_tokens}
    inputs = [model] if arguments.model_name_or_path else []
    folder = Path(arguments.work_dir) / name_of(arguments)
    if rank():
        join_run(folder, stage, identity, inputs)
        yield None
    else:
        with open_run(folder, stage, identity, inputs) as run:
            run.save("running")  # a complete run may be asked for further benchmarks
            yield run
