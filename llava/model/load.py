"""Open a checkpoint folder: processor and model, with one clear sentence when it is not one of ours."""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from llava.errors import UserError
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration
from llava.model.processing_llava_uhd import LlavaUHDProcessor
from llava.runs import local_rank


def quiet() -> None:
    """No progress bars of transformers for loading and saving; warnings stay."""
    logging.disable_progress_bar()


def check_checkpoint(folder: str | Path) -> Path:
    """The folder as a path. Raises UserError when it is no checkpoint folder of this package."""
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        nested = sorted(path.parent.name for path in folder.glob("*/config.json")) if folder.is_dir() else []
        hint = f"it has {', '.join(nested)} inside; name one of them" if nested else "check the path"
        raise UserError(f"{folder} has no config.json, so it is no checkpoint folder. Fix: {hint}")
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except ValueError as error:
        raise UserError(f"{config} is not valid JSON ({error}). Fix: run the stage that writes it again") from error
    if model_type != "llava_uhd":
        raise UserError(
            f"{folder} is a {model_type!r} model, not llava_uhd. Fix: build a checkpoint from it with "
            "`python -m llava.model.assemble`"
        )
    missing = [name for name in ("processor_config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing or not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder} has no {(missing or ['model.safetensors'])[0]}; the checkpoint is incomplete. "
            "Fix: run the stage that writes it again"
        )
    return folder


def load_processor(folder: str | Path) -> LlavaUHDProcessor:
    """The checkpoint's processor. Raises UserError when its tokenizer has more tokens than the model has rows."""
    processor = AutoProcessor.from_pretrained(check_checkpoint(folder))
    rows = json.loads((Path(folder) / "config.json").read_text())["text_config"]["vocab_size"]
    tokens = max(id for token, id in processor.tokenizer.get_vocab().items() if token != processor.image_token) + 1
    if tokens > rows:
        raise UserError(
            f"{folder}: the tokenizer has {tokens} tokens, the language model {rows} rows. "
            "Fix: put the tokenizer there that belongs to the weights"
        )
    return processor


def load_model(
    folder: str | Path, dtype: torch.dtype, attn_implementation: str | None = None, quantization_config=None
) -> LlavaUHDForConditionalGeneration:
    """Load in evaluation mode on the CPU; every parameter must be in the file and every tensor used.

    `attn_implementation` None means flash attention when it is installed and there is a GPU, else SDPA.
    """
    if attn_implementation is None:
        flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
        attn_implementation = "flash_attention_2" if flash else "sdpa"
    quiet()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            check_checkpoint(folder),
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded: {reason}. Fix: run the stage that writes it again") from error
    model._weight_conversions = []  # our names are saved as they are; ZeRO-3 would save CLIP's under older ones
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise UserError(
            f"{folder}: {len(keys)} {kind.replace('_', ' ')}, first {keys[0]!r}. Fix: rebuild the checkpoint"
        )
    return model


def open_to_ask(
    folder: str | Path, device: str | None = None
) -> tuple[LlavaUHDForConditionalGeneration, LlavaUHDProcessor]:
    """Model and processor to generate with: on this process's GPU in bfloat16, or on the CPU where there is none."""
    if device in (None, "cuda"):
        device = f"cuda:{local_rank() % torch.cuda.device_count()}" if torch.cuda.is_available() else device or "cpu"
    processor = load_processor(folder)
    model = load_model(folder, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return model.to(device).eval(), processor
