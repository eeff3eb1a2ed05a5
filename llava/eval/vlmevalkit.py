"""Evaluate through an installed VLMEvalKit, of which no file is changed.

    reads   a checkout of VLMEvalKit, or a folder that holds its package `vlmeval`; a checkpoint, or a server's address
    writes  work_dir/NAME/: VLMEvalKit's predictions (NAME_BENCHMARK.xlsx) and scores, run.json

VLMEvalKit's own run.py runs in this process, the model added to its table under the checkpoint folder's name (a served
model's own). So benchmarks, judges, ranks (torchrun) and --reuse are VLMEvalKit's. Flags that are not listed here are
handed to it: --limit 20, --api-nproc 32, --judge-base-url http://127.0.0.1:8000/v1.
"""

import argparse
import logging
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import UserError, run_command
from llava.eval.outside import (
    add_model_flags,
    ask_checkpoint,
    ask_server,
    check_model,
    model_folder,
    name_of,
)
from llava.eval.questions import OPTION_LETTERS, question_text

FAILED = "Failed to obtain answer via API."  # VLMEvalKit counts these answers, and asks again with --reuse
PREDICTIONS = (".xlsx", ".tsv", ".json")  # its PRED_FORMAT


def model_class() -> type:
    """A model as VLMEvalKit wants it: a subclass of its BaseModel, made once `vlmeval` can be imported."""
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm.base import BaseModel

    from llava.endpoint import Refused

    class LlavaUHD(BaseModel):
        """One user message a question, images where the message has them, greedy.

        Args:
            checkpoint: a folder, loaded here; None with `base_url`.
            base_url: a chat-completions server that has the model under the name `model`.
            use_vllm: VLMEvalKit hands it to every model with Qwen2-VL in its name; it means nothing here.
        """

        INTERLEAVE = True
        allowed_types = ["text", "image"]

        def __init__(
            self, checkpoint: str | None, base_url: str | None, model: str | None, max_new_tokens: int, use_vllm=False
        ):
            super().__init__()
            self.is_api = base_url is not None
            if self.is_api:
                self.answer = ask_server(base_url, model, max_new_tokens)
            else:
                self.answer = ask_checkpoint(checkpoint, max_new_tokens)

        def use_custom_prompt(self, dataset: str | None) -> bool:
            return dataset is not None and DATASET_TYPE(dataset) == "MCQ"

        def build_prompt(self, line, dataset: str | None = None) -> list[dict[str, str]]:
            """A multiple-choice row in the wording of LLaVA's instruction data, its images first."""
            images = self.dump_image(line, dataset)
            images = images if isinstance(images, list) else [images]
            row = {
                key: str(line[key])
                for key in ("hint", "question", *OPTION_LETTERS)
                if key in line and line[key] is not None and line[key] == line[key]  # NaN: the row has none
            }
            return [
                *({"type": "image", "value": image} for image in images),
                {"type": "text", "value": question_text(row)},
            ]

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            parts = [Path(part["value"]) if part["type"] == "image" else part["value"] for part in message]
            try:
                return self.answer(parts)
            except Refused as error:
                print(f"the server refused a question: {error}", file=sys.stderr)
                return FAILED

    return LlavaUHD


def run_file(folder: Path) -> Path:
    """VLMEvalKit's run.py: at the root of a checkout, or in the package. Raises UserError for another folder."""
    missing = [name for name in ("vlmeval/config.py", "vlmeval/vlm/base.py") if not (folder / name).is_file()]
    if missing:
        inside = (folder / "config.py").is_file() and (folder / "vlm" / "base.py").is_file()
        hint = f"its parent, {folder.resolve().parent}" if inside else "a checkout of VLMEvalKit"
        raise UserError(f"{folder} is no VLMEvalKit: it has no {missing[0]}. Fix: VLMEVALKIT_DIR names {hint}")
    if "supported_VLM" not in (folder / "vlmeval" / "config.py").read_text(encoding="utf-8"):
        raise UserError(f"{folder}/vlmeval/config.py has no supported_VLM. Fix: use another version of VLMEvalKit")
    for path in (folder / "run.py", folder / "vlmeval" / "run.py"):
        if path.is_file():
            return path
    raise UserError(f"{folder} has neither run.py nor vlmeval/run.py. Fix: VLMEVALKIT_DIR names a whole checkout")


def run_arguments(arguments: argparse.Namespace, others: list[str]) -> list[str]:
    """The command line of VLMEvalKit's run.py."""
    return [
        "--data", *arguments.data, "--model", name_of(arguments), "--work-dir", arguments.work_dir,
        "--mode", arguments.mode, *(["--judge", arguments.judge] if arguments.judge else []),
        *(["--reuse"] if arguments.reuse else []), *others,
    ]  # fmt: skip


def load_run(folder: Path) -> dict[str, Any]:
    """What VLMEvalKit's run.py defines; nothing is run yet.

    It gives every rank its GPUs when it is loaded, so it is loaded before anything here looks for one.
    """
    path = run_file(folder)
    sys.path.insert(0, str(folder.resolve()))
    try:
        return runpy.run_path(str(path), run_name="vlmeval_run")
    except ImportError as error:
        raise UserError(
            f"VLMEvalKit in {folder} cannot be imported ({error}). Fix: install its requirements into this environment"
        ) from error


def register(arguments: argparse.Namespace) -> None:
    """Add the model to VLMEvalKit's table, in memory."""
    from vlmeval.config import supported_VLM

    made = model_class()

    def make(**given: Any):
        return made(
            arguments.model_name_or_path, arguments.base_url, arguments.model, arguments.max_new_tokens, **given
        )

    supported_VLM[name_of(arguments)] = make


@contextmanager
def given_up() -> Iterator[list[str]]:
    """What VLMEvalKit gives up on while the block runs: it logs the reason, goes on, and ends as if all were well."""
    reasons, make = [], logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if "combination failed" in made.getMessage():
            reasons.append(made.getMessage())
        return made

    logging.setLogRecordFactory(record)
    try:
        yield reasons
    finally:
        logging.setLogRecordFactory(make)


def unanswered(folder: Path, name: str, benchmarks: list[str]) -> list[str]:
    """Benchmarks without a file of predictions."""
    stems = {path.stem for path in folder.rglob(f"{name}_*") if path.suffix in PREDICTIONS}
    return [benchmark for benchmark in benchmarks if f"{name}_{benchmark}" not in stems]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.vlmevalkit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--vlmevalkit_dir", required=True, help="checkout of VLMEvalKit, or where its package lies")
    parser.add_argument("--data", required=True, nargs="+", help="VLMEvalKit's names of benchmarks")
    add_model_flags(parser)
    parser.add_argument("--mode", default="all", choices=["all", "infer", "eval"], help="(default: all)")
    parser.add_argument("--judge", help="model that VLMEvalKit asks to judge; exact_matching for none")
    parser.add_argument("--reuse", action="store_true", help="continue from predictions that are there")
    arguments, others = parser.parse_known_args()

    folder, name = Path(arguments.vlmevalkit_dir), name_of(arguments)
    path, command = run_file(folder), run_arguments(arguments, others)
    if arguments.dry_run:
        check_model(arguments)
        print(f"model        {name}: {arguments.model_name_or_path or f'served at {arguments.base_url}'}")
        print(f"runs         python {shlex.join([str(path), *command])}")
        print(f"writes       {arguments.work_dir}/{name}/ (nothing was written)")
        return
    run = load_run(folder)
    check_model(arguments)
    with model_folder(arguments, "vlmevalkit") as held:
        register(arguments)
        sys.argv = [str(path), *command]
        with given_up() as reasons:
            run["main"]()
        if reasons:
            raise UserError(f"{reasons[0]} Fix: what VLMEvalKit logged above, then run the same command again")
        if held:
            missing = unanswered(held.folder, name, arguments.data)
            if missing:
                raise UserError(
                    f"VLMEvalKit left no predictions for {', '.join(missing)}; its log above says why. "
                    "Fix: that, then run the same command again"
                )
            held.finish(held.folder, benchmarks=len(arguments.data))


if __name__ == "__main__":
    run_command(main)
