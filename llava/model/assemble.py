"""Build a first checkpoint from a CLIP folder and a language-model folder in their published Hugging Face layout.

    python -m llava.model.assemble --vision model_weight/clip-vit-large-patch14-336 \
        --language model_weight/Qwen2-7B-Instruct --output model_weight/llava-uhd-init

The projector is new (seeded); tower and language model are copied. The result is a complete `from_pretrained` folder:
weights, config, tokenizer with chat template and `<image>`, image processor. Stage 1 (align) starts from it.
"""

import argparse
import json
import os
import pickle
import shutil
from pathlib import Path

from llava.errors import UserError, run_command
from llava.records import write_json
from llava.runs import fingerprint

ORIGIN = "assembled.json"  # what the folder was made from
# Separator ids of published checkpoints: Llama 2's newline and comma, kept when the language model became Qwen2.
LEGACY_NEWLINE, LEGACY_COMMA = 13, 29892


def assemble(
    vision: str | Path,
    language: str | Path,
    output: str | Path,
    projector_type: str = "spatial_resampler",
    resampler_grid: int = 12,
    dtype: str = "float32",
    seed: int = 0,
    projector: str | Path | None = None,
) -> Path:
    """Write the checkpoint folder and return its path.

    With `projector`, a published `mm_projector.bin` takes the place of the new one, and the config says what such
    weights were trained with: RoIAlign without half-cell correction, separator ids 13 and 29892.

    Called again with the same inputs it does nothing.

    Raises:
        UserError: the output exists with other contents, a folder is no CLIP / causal-LM folder, or the tokenizer's
            chat format is unknown.
    """
    check_folders(vision, language)
    origin = {
        "vision": fingerprint(Path(vision)), "language": fingerprint(Path(language)), "projector_type": projector_type,
        "resampler_grid": resampler_grid, "dtype": dtype, "seed": seed,
        "projector": fingerprint(Path(projector)) if projector else None,
    }  # fmt: skip
    if Path(output).exists():
        refuse_other_origin(Path(output), origin)
        return Path(output)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

    from llava.model.chat_templates import prepare_tokenizer
    from llava.model.load import quiet

    quiet()
    weight_type = getattr(torch, dtype)
    clip = load_whole(CLIPVisionModel, vision, weight_type)
    language_model = load_whole(AutoModelForCausalLM, language, weight_type)
    tokenizer = AutoTokenizer.from_pretrained(language)
    prepare_tokenizer(tokenizer, language)
    config = make_config(
        tokenizer, clip.config, language_model.config, projector_type, resampler_grid,
        resampler_roi_aligned=projector is None, **clip_preprocessing(Path(vision)),
    )  # fmt: skip
    model = with_new_projector(config, clip, language_model, seed)
    if projector:
        load_projector(model.model.projector, Path(projector))
    separators = {"newline_token_id": LEGACY_NEWLINE, "comma_token_id": LEGACY_COMMA} if projector else {}
    return write_checkpoint(output, model, make_processor(tokenizer, config, **separators), origin)


def make_config(tokenizer, vision_config, text_config, projector_type: str, resampler_grid: int, **fields):
    """The checkpoint's config; special token ids come from the prepared tokenizer."""
    from llava.model.configuration_llava_uhd import LlavaUHDConfig

    return LlavaUHDConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_type=projector_type,
        resampler_grid=resampler_grid,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )


def make_processor(tokenizer, config, long_side: int | None = None, slice_layout: str = "stitched", **fields):
    """The processor that belongs to `config`: UHD slices for a resampler, one square for `mlp2x_gelu`."""
    from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
    from llava.model.processing_llava_uhd import LlavaUHDProcessor

    uses_resampler = config.projector_type == "spatial_resampler"
    image_processor = LlavaUHDImageProcessor(
        image_mode="uhd" if uses_resampler else "square",
        resolution=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        long_side=long_side,
        slice_layout=slice_layout,
    )
    return LlavaUHDProcessor(
        image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
        resampler_grid=config.resampler_grid if uses_resampler else None,
        **fields,
    )


def with_new_projector(config, clip, language_model, seed: int):
    """The whole model around two loaded ones, whose tensors it takes over; the projector is drawn from `seed`."""
    import torch

    from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration, projector_of

    with torch.device("meta"):
        model = LlavaUHDForConditionalGeneration(config)
    torch.manual_seed(seed)
    model.model.projector = projector_of(config).apply(model._init_weights).to(language_model.dtype)
    model.model.vision_tower.clip.load_state_dict(clip.state_dict(), assign=True)
    model.model.language_model = language_model.model
    model.lm_head.weight = language_model.lm_head.weight
    return model


def write_checkpoint(output: str | Path, model, processor, origin: dict) -> Path:
    """Save model, processor and what they were made from; the folder appears complete or not at all."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )  # sampling settings of the language model's own folder are not inherited
    partial = Path(f"{output}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        write_json(partial / ORIGIN, origin)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Path(output)


def refuse_other_origin(output: Path, origin: dict) -> None:
    """Raise UserError unless the folder was assembled from the same things."""
    path = output / ORIGIN
    old = json.loads(path.read_text()) if path.is_file() else {}
    differing = [key for key in origin if old.get(key) != origin[key]]
    if differing:
        raise UserError(
            f"{output} exists already and was assembled with another {differing[0]}. Fix: name a new folder, or delete it"
        )


def load_whole(model_class, folder: str | Path, dtype):
    """`from_pretrained` that needs every parameter in the folder; extra tensors (CLIP's text tower) are left out."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report on left-out tensors is long and expected
    try:
        model, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{folder} cannot be loaded as {model_class.__name__}: {reason}. Fix: name another folder"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of a {model_class.__name__}, first {missing[0]!r}. Fix: name a complete folder"
        )
    return model


def check_folders(vision: str | Path, language: str | Path) -> None:
    """Raise UserError when a folder is no published CLIP or language-model folder."""
    for folder, flag, what in ((vision, "--vision", "CLIP"), (language, "--language", "language-model")):
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{flag} {folder} has no config.json. Fix: name a {what} folder as published")


def load_projector(module, path: Path) -> None:
    """Fill the projector from a published `mm_projector.bin`; names up to `mm_projector.` are cut, all must match."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict({name.split("mm_projector.")[-1]: tensor for name, tensor in tensors.items()})
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is no projector of this shape: {reason}. Fix: check the file and RESAMPLER_GRID"
        ) from error


def clip_preprocessing(folder: Path) -> dict[str, list[float]]:
    """Normalisation stated in a CLIP folder's preprocessor_config.json; CLIP's own constants when it has none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    stated = json.loads(path.read_text())
    return {key: stated[key] for key in ("image_mean", "image_std") if key in stated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="CLIP folder (config.json, model.safetensors)")
    parser.add_argument("--language", required=True, help="causal-LM folder with its tokenizer")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument("--projector_type", default="spatial_resampler", choices=["spatial_resampler", "mlp2x_gelu"])
    parser.add_argument("--resampler_grid", type=int, default=12, help="queries a side; 12 in the paper")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--projector", help="a published mm_projector.bin instead of a new projector")
    parser.add_argument("--seed", type=int, default=0, help="of the new projector")
    parser.add_argument("--dry_run", action="store_true", help="check the folders, write nothing")
    arguments = vars(parser.parse_args())
    if arguments.pop("dry_run"):
        check_folders(arguments["vision"], arguments["language"])
        print(f"writes       {arguments['output']} (nothing was written)")
        return
    print(f"wrote {assemble(**arguments)}")


if __name__ == "__main__":
    run_command(main)
