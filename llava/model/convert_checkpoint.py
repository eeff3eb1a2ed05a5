"""Convert a published LLaVA-UHD / SICOG checkpoint into a checkpoint folder of this package.

    python -m llava.model.convert_checkpoint --source model_weight/sicog-llava-qwen2-7b-uhd \
        --vision model_weight/clip-vit-large-patch14-336 --output model_weight/sicog-converted

`--source` is a folder (config.json, tokenizer, weights in one file or in shards, `.safetensors` or `.bin`), or a
published `mm_projector.bin`, which wants `--vision` and `--language`. Every tensor must find its place and every place
its tensor: anything else is an error, and nothing is written. What the weights were trained with is kept: separator
ids 13 and 29892, RoIAlign without half-cell correction, labels on headers and newlines, images resized to 1024 first.
"""

import argparse
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

from llava.errors import UserError, run_command
from llava.model.assemble import (
    LEGACY_COMMA,
    LEGACY_NEWLINE,
    assemble,
    clip_preprocessing,
    make_config,
    make_processor,
    refuse_other_origin,
    write_checkpoint,
)
from llava.runs import fingerprint

# published name of a projector -> (projector_type, resampler_grid)
PROJECTORS = {
    "adapt_spatial_resampler_v1": ("spatial_resampler", 12),
    "uhd_v1": ("spatial_resampler", 12),
    "uhd_v1_query64": ("spatial_resampler", 8),
    "mlp2x_gelu": ("mlp2x_gelu", 12),
}
LANGUAGE_MODELS = {"llava_qwen": "qwen2", "llava_llama": "llama", "llava": "llama"}
PREFIXES = (  # published prefix -> ours, first match wins
    ("model.mm_projector.", "model.projector."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.clip."),
    ("model.vision_tower.vision_tower.", "model.vision_tower.clip."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),
)
RECOMPUTED = ("position_ids", "rotary_emb.inv_freq")  # buffers that old versions saved


def new_name(name: str) -> str | None:
    """Our name of a published tensor; None when it is recomputed on loading."""
    if name.endswith(RECOMPUTED):
        return None
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, as its index lists them. Raises UserError when one is missing."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(f"{folder}/{index} names {missing[0]}, which is not there. Fix: download it again")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(f"{folder} has neither safetensors nor pytorch_model.bin weights. Fix: name a checkpoint folder")


def read_tensors(path: Path) -> Iterator[tuple[str, object]]:
    """Name and tensor of everything in one weight file; a `.bin` is read without running any code in it."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read: {reason}. Fix: download the file again") from error


def read_config(source: Path) -> dict:
    """The published config.json, checked for settings this package does not have.

    Raises:
        UserError: another model type, projector, feature selection, or an `unpad` layout.
    """
    path = source / "config.json"
    if not path.is_file():
        raise UserError(f"{source} has no config.json. Fix: name a published checkpoint folder")
    stated = json.loads(path.read_text())
    wanted = {
        "model_type": tuple(LANGUAGE_MODELS),
        "mm_projector_type": tuple(PROJECTORS),
        "mm_vision_select_feature": ("patch",),
        "mm_patch_merge_type": ("flat",),
    }
    for key, choices in wanted.items():
        default = choices[0] if key in ("mm_vision_select_feature", "mm_patch_merge_type") else None
        if (value := stated.get(key, default)) not in choices:
            raise UserError(f"{path}: {key} is {value!r}; this converter reads {', '.join(choices)}")
    return stated


def text_config(stated: dict):
    """The language model's own config out of the published one."""
    from transformers import CONFIG_MAPPING

    model_type = LANGUAGE_MODELS[stated["model_type"]]
    foreign = ("mm_", "vision_", "image_", "tune_", "unfreeze_", "tokenizer_", "freeze_", "use_mm_")
    fields = {key: value for key, value in stated.items() if not key.startswith(foreign)}
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype"):
        fields.pop(key, None)
    return CONFIG_MAPPING[model_type].from_dict(fields)


def convert(
    source: str | Path,
    output: str | Path,
    vision: str | Path,
    language: str | Path | None = None,
    slice_layout: str = "stitched",
    long_side: int | None = 1024,
) -> Path:
    """Write the converted folder, print what was matched, and return its path.

    Raises:
        UserError: see the module's text; the message names the first tensor or setting in question.
    """
    source = Path(source)
    if source.suffix == ".bin":
        if language is None:
            raise UserError(f"{source} is a projector alone. Fix: name its language model with --language")
        return assemble(vision, language, output, projector=source)
    stated = read_config(source)
    origin = {
        "source": fingerprint(source), "vision": fingerprint(Path(vision)), "slice_layout": slice_layout,
        "long_side": long_side,
    }  # fmt: skip
    if Path(output).exists():
        refuse_other_origin(Path(output), origin)
        return Path(output)
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig

    from llava.model.chat_templates import prepare_tokenizer
    from llava.model.load import quiet
    from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration

    quiet()
    language_config = text_config(stated)
    tokenizer = AutoTokenizer.from_pretrained(source, config=language_config)
    prepare_tokenizer(tokenizer, source)
    projector_type, grid = PROJECTORS[stated["mm_projector_type"]]
    config = make_config(
        tokenizer, CLIPVisionConfig.from_pretrained(vision), language_config, projector_type, grid,
        resampler_roi_aligned=False, vision_feature_layer=stated.get("mm_vision_select_layer", -2),
        **clip_preprocessing(Path(vision)),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaUHDForConditionalGeneration(config)
    tensors = collect(source, Path(vision), set(model.state_dict()))
    fill(model, tensors, source)
    separators = {"newline_token_id": LEGACY_NEWLINE, "comma_token_id": LEGACY_COMMA, "single_column_comma": False}
    legacy_labels = LANGUAGE_MODELS[stated["model_type"]] == "qwen2"
    processor = make_processor(
        tokenizer,
        config,
        long_side=long_side if projector_type == "spatial_resampler" else None,
        slice_layout=slice_layout,
        label_policy="legacy_qwen" if legacy_labels else "assistant",
        **separators,
    )
    return write_checkpoint(output, model, processor, origin)


def collect(source: Path, vision: Path, expected: set[str]) -> dict:
    """All tensors under our names. The tower comes from the CLIP folder where the checkpoint has none.

    Raises:
        UserError: a tensor that has no place in the model.
    """
    tensors, recomputed, unexpected = {}, 0, []
    for file in weight_files(source):
        for name, tensor in read_tensors(file):
            ours = new_name(name)
            if ours is None:
                recomputed += 1
            elif ours in expected:
                tensors[ours] = tensor
            else:
                unexpected.append(name)
    if unexpected:
        raise UserError(
            f"{source}: {len(unexpected)} tensors have no place in this model, first {unexpected[0]!r}. "
            "Fix: the checkpoint is of another kind than its config.json says"
        )
    from_checkpoint = len(tensors)
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        for file in weight_files(vision):
            for name, tensor in read_tensors(file):
                ours = f"model.vision_tower.clip.{name.removeprefix('vision_model.')}"
                if ours in expected:
                    tensors[ours] = tensor
    print(
        f"matched      {from_checkpoint} tensors of {source}, {len(tensors) - from_checkpoint} of {vision}; "
        f"{recomputed} recomputed buffers left out"
    )
    return tensors


def fill(model, tensors: dict, source: Path) -> None:
    """Put the tensors in place, in the type most of them have.

    Raises:
        UserError: a missing tensor, a wrong shape, or something that is no floating-point tensor.
    """
    import torch

    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(state) - set(tensors) - tied)
    if missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, first {missing[0]!r}. Fix: download it again")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(state[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{source}: {name} is {tensor.dtype}; quantised checkpoints cannot be converted")
    dtype = tensors["model.language_model.embed_tokens.weight"].dtype
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.to(dtype)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{source} holds weights that are not finite numbers. Fix: download it again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="published checkpoint folder, or an mm_projector.bin")
    parser.add_argument("--vision", required=True, help="CLIP folder: its config, and its weights where needed")
    parser.add_argument("--language", help="language-model folder, for an mm_projector.bin")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--slice_layout", default="stitched", choices=["stitched", "per_slice"],
        help="order of the slices' features: stitched (SICOG) or per_slice (LLaVA-UHD v1)",
    )  # fmt: skip
    parser.add_argument(
        "--long_side", type=int, default=1024, help="resize images to this long side first, as published; 0: native"
    )
    arguments = vars(parser.parse_args())
    arguments["long_side"] = arguments["long_side"] or None
    print(f"wrote {convert(**arguments)}")


if __name__ == "__main__":
    run_command(main)
