"""The command line of supervised training: our flags, then every flag of transformers' TrainingArguments.

Only the standard library is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import datetime
import importlib.util
import os
import sys
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from llava.errors import UserError

NOTE = """Every flag of transformers.TrainingArguments is accepted too: --learning_rate, --num_train_epochs,
--per_device_train_batch_size, --deepspeed, --report_to (tensorboard, wandb, trackio), --save_steps, ...
--bf16 is on where a GPU is present, unless --bf16 False or --fp16 is given; --use_liger_kernel where liger-kernel is
installed beside a GPU."""


def flag(help_text: str, default: Any = MISSING, **more: Any):
    """A dataclass field with its help."""
    metadata = {"help": help_text, **more}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = flag("checkpoint folder to start from")
    train_parts: str = flag(
        "comma-separated parts that train: vision, projector, language", "vision,projector,language"
    )
    lora_rank: int = flag("train additions of this rank to the language model's layers (LoRA) instead of them", 0)
    lora_alpha: int | None = flag("LoRA's scale; default: twice the rank", None)
    lora_dropout: float = flag("dropout of LoRA's inputs", 0.0)
    four_bit: bool = flag("with --lora_rank: hold the language model in 4 bits while training (QLoRA)", False)
    recompute: str = flag(
        "with --gradient_checkpointing: `selective` keeps attention and narrow products, `full` recomputes all",
        "selective",
    )
    attn_implementation: str | None = flag("sdpa, eager or flash_attention_2; default: flash if installed", None)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = flag("record files (.json, .jsonl), comma-separated; a file named twice weighs twice")
    image_folder: str | None = flag("root of the records' image paths; default: each file's own folder", None)
    overview_only: bool = flag("show each image without slices (stage 1)", False)
    max_length: int = flag("longest sequence in tokens, image tokens included", 4096)
    global_batch_size: int | None = flag("samples per optimizer step over all GPUs; derives the accumulation", None)
    packing: bool = flag("samples of a batch side by side in one row, balanced over ranks; off: padded rows", True)
    dry_run: bool = flag("check arguments and data, report what would happen, touch nothing", False)


def print_help(module: str, description: str, *groups: type) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=NOTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for entry in fields(group):
            shown = "required" if entry.default is MISSING else f"default: {entry.default}"
            section.add_argument(f"--{entry.name}", metavar="", help=f"{entry.metadata['help']} ({shown})")
    parser.print_help()


def parse_arguments(module: str, description: str, *own: type, defaults: dict[str, Any]) -> tuple:
    """Parse sys.argv into our dataclasses and a TrainingArguments.

    Args:
        defaults: TrainingArguments that hold unless the command line says otherwise.
    """
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print_help(module, description, *own)
        sys.exit(0 if arguments else 2)
    check_own_flags(arguments, own)

    import torch
    from transformers import HfArgumentParser, TrainingArguments

    given = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")
    }
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and "fp16" not in given
    hardware: dict[str, Any] = {"bf16": True} if bf16 else {}
    if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
        hardware["use_liger_kernel"] = True
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        hardware["use_cpu"] = True
    for name, value in {**defaults, **hardware}.items():
        if name not in given:
            arguments += [f"--{name}", str(value)]
    arguments += accumulation_flag(arguments)
    if hardware.get("use_cpu") and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # transformers hands --ddp_timeout on for GPUs alone
        seconds = int(flag_values(arguments).get("ddp_timeout", 1800))
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds))
    *parsed, unknown = HfArgumentParser((*own, TrainingArguments)).parse_args_into_dataclasses(
        arguments, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}. Fix: see --help, or transformers.TrainingArguments")
    return tuple(parsed)


def flag_values(arguments: list[str]) -> dict[str, str]:
    """Flag name (with underscores) -> value, the last one given."""
    values = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values[name.replace("-", "_")] = value if equals else following
    return values


def accumulation_flag(arguments: list[str]) -> list[str]:
    """The derived --gradient_accumulation_steps: it must be known before TrainingArguments fills a DeepSpeed config."""
    values = flag_values(arguments)
    if not values.get("global_batch_size", "").isdigit():
        return []
    stated = values.get("gradient_accumulation_steps")
    steps = derive_accumulation(
        int(values["global_batch_size"]),
        int(values.get("per_device_train_batch_size", 8)),
        int(stated or 1),
        bool(stated),
    )
    return ["--gradient_accumulation_steps", str(steps)]


def check_own_flags(arguments: list[str], own: tuple[type, ...]) -> None:
    """Raise UserError for a required flag of ours that is missing or empty."""
    values = flag_values(arguments)
    for group in own:
        for entry in fields(group):
            if entry.default is MISSING and values.get(entry.name, "") in ("", "''"):
                raise UserError(f"--{entry.name} is missing: {entry.metadata['help']}")


def planned_world_size() -> int:
    """Processes of the job; in a dry run, which is one process, those the real run would have (set by launch.sh)."""
    return int(os.environ.get("PLANNED_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def derive_accumulation(global_batch_size: int | None, per_device: int, accumulation: int, given: bool) -> int:
    """Gradient accumulation steps that make the stated global batch, checked.

    Args:
        given: whether the user stated `accumulation` too; then both must agree.

    Raises:
        UserError: the global batch is not a multiple, or the two statements disagree.
    """
    world = planned_world_size()
    if global_batch_size is None:
        return accumulation
    step = per_device * world
    if global_batch_size % step:
        raise UserError(
            f"global batch {global_batch_size} is not a multiple of {per_device} per device x {world} processes = {step}. "
            "Fix: change GLOBAL_BATCH_SIZE or the batch per device"
        )
    derived = global_batch_size // step
    if given and accumulation != derived:
        raise UserError(
            f"accumulation {accumulation} x {per_device} per device x {world} processes = {accumulation * step}, but the "
            f"global batch is stated as {global_batch_size}. Fix: drop one of ACCU_STEPS and GLOBAL_BATCH_SIZE, or make "
            f"ACCU_STEPS {derived}"
        )
    return derived
