"""Evaluate through an installed lmms-eval, as its model `llava_uhd`.

    reads   a checkpoint, or a server's address; lmms-eval's tasks
    writes  work_dir/NAME/: lmms-eval's results and samples, answers/ (one line an answer, resumable), run.json

lmms-eval finds the model by the entry point `lmms_eval.models`, so its own command works too:

    python -m lmms_eval --model llava_uhd --model_args pretrained=CHECKPOINT --tasks mme --batch_size 16

A served model is asked by lmms-eval's own `openai`. Flags that are not listed here are handed to lmms-eval: --limit 8.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.eval.outside import add_model_flags, check_model, model_folder, name_of, prompt_of
from llava.records import RecordAppender, read_jsonl
from llava.runs import rank, world_size
from llava.seeds import seed_of

MODEL_ID = "llava_uhd"
OPENAI_LENGTH = 1024  # new tokens of lmms-eval's own `openai`


def manifest():
    """What the entry point gives lmms-eval: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="llava.eval.lmms_model.LlavaUHD")


def __getattr__(name: str) -> type:
    """`LlavaUHD` is made when lmms-eval asks for it: without lmms-eval there is nothing to make it from."""
    if name == "LlavaUHD":
        return model_class()
    raise AttributeError(name)


def model_class() -> type:
    """A model as lmms-eval wants it: a subclass of its `lmms` that is given chat messages."""
    from lmms_eval.api.model import lmms

    from llava.model.load import open_to_ask

    class LlavaUHD(lmms):
        """Args, from `--model_args` and lmms-eval's own flags:

        pretrained: checkpoint folder.
        batch_size: answers decoded at a time.
        max_new_tokens: where the task does not say.
        resume: folder of answers, one file a rank; what is there is not asked again.
        """

        is_simple = False

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 1,
            max_new_tokens: int = 1024,
            device: str | None = None,
            resume: str | None = None,
            max_batch_size: int | None = None,
        ):
            super().__init__()
            if not str(batch_size).isdigit():
                raise UserError(f"batch_size {batch_size} is no number. Fix: --batch_size 16")
            self._rank, self._world_size = rank(), world_size()
            self.model, self.processor = open_to_ask(pretrained, device)
            self.device, self.batch_size = self.model.device, int(batch_size)
            self.max_new_tokens = max_new_tokens
            self.resume = Path(resume) if resume else None

        def generate_until(self, requests: list) -> list[str]:
            """The answers in the order of the requests."""
            keys = keys_of(requests)
            answers = earlier(self.resume) if self.resume else {}
            waiting = defaultdict(list)
            for key, request in zip(keys, requests, strict=True):
                if key not in answers:
                    waiting[sampling_of(request.args[2], self.max_new_tokens)].append((key, request))
            for key, request, text in generate(self, waiting, len(requests)):
                answers[key] = text
                self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), text)
            return [answers[key] for key in keys]

        def loglikelihood(self, requests: list):
            raise NotImplementedError(
                f"{MODEL_ID} writes answers and gives no likelihoods. Fix: choose tasks with output_type generate_until"
            )

        def generate_until_multi_round(self, requests: list):
            raise NotImplementedError(
                f"{MODEL_ID} answers one message at a time. Fix: choose tasks with output_type generate_until"
            )

    return LlavaUHD


def generate(lm, waiting: dict[Any, list], total: int) -> Iterator[tuple[str, Any, str]]:
    """(key, request, text) as each is answered, after it is written to the model's `resume`."""
    from tqdm import tqdm

    from llava.generate.candidates import Draw
    from llava.generate.sampling import stream

    def prompts(members: list) -> Iterator:
        for key, request in members:
            _, messages_of, _, document, task, split = request.args
            parts = parts_of(messages_of(lm.task_dict[task][split][document]), task)
            yield (key, request), prompt_of(parts, [Draw(0, seed_of(key))])

    done = total - sum(map(len, waiting.values()))
    with (
        RecordAppender(lm.resume / f"rank_{lm.rank}.jsonl") if lm.resume else nullcontext() as kept,
        tqdm(total=total, initial=done, desc=MODEL_ID, unit="question", disable=lm.rank != 0) as bar,
    ):
        for sampling, members in waiting.items():
            drawn = stream(lm.model, lm.processor, prompts(members), sampling, lm.batch_size)
            for (key, request), [(_, completion)] in drawn:
                text = cut(completion.text, request.args[2].get("until"))
                if kept:
                    kept.append({"key": key, "text": text})
                bar.update()
                yield key, request, text


def earlier(folder: Path) -> dict[str, str]:
    """The answers of an interrupted evaluation, whatever number of ranks it had."""
    return {row["key"]: row["text"] for file in sorted(folder.glob("rank_*.jsonl")) for row in read_jsonl(file)}


def keys_of(requests: list) -> list[str]:
    """A name for every request that is the same in every run: task, split, document, text, settings, which repeat."""
    seen, keys = Counter(), []
    for request in requests:
        text, _, settings, document, task, split = request.args
        key = json.dumps([task, split, document, text, settings], sort_keys=True, default=str)
        keys.append(f"{key} {seen[key]}")
        seen[key] += 1
    return keys


def sampling_of(settings: dict[str, Any], max_new_tokens: int):
    """A task's generation settings as ours. Greedy unless it states a temperature."""
    from llava.generate.candidates import Sampling

    length = int(settings.get("max_new_tokens") or max_new_tokens)
    beams = int(settings.get("num_beams") or 1)
    temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
    if temperature == 0:
        return Sampling(temperature=0, num_beams=beams, max_new_tokens=length)
    top_p, top_k = float(settings.get("top_p") or 1), int(settings.get("top_k") or 0)
    return Sampling(temperature, top_p, top_k, beams, length)


def cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the strings that end an answer."""
    ends = [until] if isinstance(until, str) else until or []
    return text[: min([text.find(end) for end in ends if end and end in text], default=len(text))]


def parts_of(messages: list[dict[str, Any]], task: str) -> list:
    """Chat messages as parts of one user message; what the system says comes first."""
    parts = []
    for message in messages:
        if message["role"] == "assistant":
            raise UserError(
                f"{task} puts words into the model's mouth, which {MODEL_ID} cannot take. Fix: leave it out"
            )
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(part["text"])
            elif part["type"] == "image":
                parts.append(Path(part["url"]) if isinstance(part["url"], str) else part["url"])
            else:
                raise UserError(f"{task} has {part['type']}; {MODEL_ID} sees images only. Fix: leave it out")
    return parts


def run_arguments(arguments: argparse.Namespace, others: list[str]) -> list[str]:
    """The command line of lmms-eval."""
    folder = Path(arguments.work_dir) / name_of(arguments)
    if arguments.base_url:
        model, given = "openai", {"model": arguments.model, "base_url": arguments.base_url}
        given["num_concurrent"] = arguments.batch_size
        if arguments.max_new_tokens != OPENAI_LENGTH:
            raise UserError(
                f"lmms-eval gives a served model {OPENAI_LENGTH} new tokens where the task does not say. "
                f"Fix: --gen_kwargs max_new_tokens={arguments.max_new_tokens}, which wins over the tasks too"
            )
        resumed = ["--use_cache", str(folder / "cache")]
    else:
        model, given = MODEL_ID, {"pretrained": arguments.model_name_or_path}
        given.update(max_new_tokens=arguments.max_new_tokens, resume=folder / "answers")
        resumed = []
    for flag, value in given.items():
        if "," in str(value):
            raise UserError(f"{flag} {value!r} has a comma, which separates lmms-eval's model_args. Fix: rename it")
    return [
        "--model", model, "--model_args", ",".join(f"{flag}={value}" for flag, value in given.items()),
        "--tasks", ",".join(arguments.tasks), "--batch_size", str(arguments.batch_size),
        "--output_path", str(folder), "--log_samples", *resumed, *others,
    ]  # fmt: skip


def evaluate(command: list[str]) -> None:
    """Run lmms-eval in this process, the model registered whether or not its entry point is installed."""
    try:
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
    except ImportError as error:
        raise UserError(f"lmms-eval cannot be imported ({error}). Fix: install its requirements too") from error
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    sys.argv = ["lmms_eval", *command]
    cli_evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.lmms_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tasks", required=True, nargs="+", help="lmms-eval's names of tasks")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time (default: 16)")
    add_model_flags(parser)
    arguments, others = parser.parse_known_args()

    name, command = name_of(arguments), run_arguments(arguments, others)
    check_model(arguments)
    installed = importlib.util.find_spec("lmms_eval") is not None
    if arguments.dry_run:
        print(f"model        {name}: {arguments.model_name_or_path or f'served at {arguments.base_url}'}")
        print(f"lmms-eval    {'installed' if installed else 'not installed here'}")
        print(f"runs         python -m lmms_eval {shlex.join(command)}")
        print(f"writes       {arguments.work_dir}/{name}/ (nothing was written)")
        return
    if not installed:
        raise UserError("lmms-eval is not installed. Fix: install the package lmms-eval into this environment")
    if arguments.base_url:
        from llava.endpoint import is_loopback

        if is_loopback(arguments.base_url):
            os.environ.setdefault("OPENAI_API_KEY", "none")
    with model_folder(arguments, "lmms-eval") as held:
        before = len(list(held.folder.rglob("*_results.json"))) if held else 0
        evaluate(command)
        if held:
            if len(list(held.folder.rglob("*_results.json"))) == before:
                raise UserError(
                    "lmms-eval left no results; its message above says why. Fix: that, then run the same command again"
                )
            held.finish(held.folder, benchmarks=len(arguments.tasks))


if __name__ == "__main__":
    run_command(main)
