"""Write a checkpoint in a form that opens without this package.

    python -m llava.model.export_hf --checkpoint runs/quickstart/sicog --output exported/sicog

A low-resolution model (`mlp2x_gelu`) becomes a stock `LlavaForConditionalGeneration` folder. A UHD model becomes a
self-contained folder: the same weights beside a copy of the model's own source files, opened with
`trust_remote_code`. `python -m llava.model.verify` compares such a folder with the checkpoint it came from.
"""

import argparse
import ast
import json
import os
import re
import shutil
from pathlib import Path

from llava.errors import UserError, run_command
from llava.records import write_json

MODEL_FOLDER = Path(__file__).parent
SOURCES = (
    "configuration_llava_uhd", "image_processing_llava_uhd", "processing_llava_uhd", "modeling_llava_uhd", "slicing",
    "vision", "resampler", "head", "packed_attention", "../images", "../errors",
)  # fmt: skip
MODEL_CLASS = "modeling_llava_uhd.LlavaUHDForConditionalGeneration"
AUTO_MAP = {
    "config": {
        "AutoConfig": "configuration_llava_uhd.LlavaUHDConfig",
        "AutoModel": "modeling_llava_uhd.LlavaUHDModel",
        "AutoModelForImageTextToText": MODEL_CLASS,
        "AutoModelForMultimodalLM": MODEL_CLASS,
    },
    "processor": {"AutoProcessor": "processing_llava_uhd.LlavaUHDProcessor"},
    "image_processor": {"AutoImageProcessor": "image_processing_llava_uhd.LlavaUHDImageProcessor"},
}


def export(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the exported folder and return its path.

    Raises:
        UserError: `checkpoint` is no checkpoint folder, or `output` exists.
    """
    from llava.model.load import check_checkpoint

    checkpoint, output = check_checkpoint(checkpoint), Path(output)
    if output.exists():
        raise UserError(f"{output} exists already. Fix: name a new folder, or delete it")
    projector_type = json.loads((checkpoint / "config.json").read_text())["projector_type"]
    write = write_stock_llava if projector_type == "mlp2x_gelu" else write_self_contained
    partial = Path(f"{output}.{os.uname().nodename}.{os.getpid()}.partial")  # appears complete or not at all
    partial.mkdir(parents=True)
    try:
        write(checkpoint, partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def write_self_contained(checkpoint: Path, output: Path) -> None:
    """The checkpoint's files with the source files they need and an `auto_map` that names their classes."""
    for pattern in ("*.json", "*.jinja", "*.txt", "model*.safetensors"):
        for file in checkpoint.glob(pattern):
            if file.name not in ("run.json", "assembled.json"):
                shutil.copyfile(file, output / file.name)
    for name in SOURCES:
        source = (MODEL_FOLDER / f"{name}.py").read_text()
        (output / f"{Path(name).name}.py").write_text(standalone(source))
    config = json.loads((output / "config.json").read_text())
    write_json(output / "config.json", {**config, "auto_map": AUTO_MAP["config"]})
    processor = json.loads((output / "processor_config.json").read_text())
    processor["auto_map"] = {**AUTO_MAP["processor"], **AUTO_MAP["image_processor"]}
    processor["image_processor"]["auto_map"] = AUTO_MAP["image_processor"]
    write_json(output / "processor_config.json", processor)


def standalone(source: str) -> str:
    """A source file of the model that imports its neighbours in the same folder and registers nothing.

    Raises:
        ValueError: it still imports this package in another way.
    """
    source = re.sub(r"^( *)from llava\.(?:model\.)?(\w+) import", r"\1from .\2 import", source, flags=re.MULTILINE)
    source = re.sub(r"^Auto\w+\.register\(.*\)\n", "", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if any(name.split(".")[0] == "llava" for name in names):
            raise ValueError(f"line {node.lineno} imports {names[0]}; an exported file cannot")
    return source


def write_stock_llava(checkpoint: Path, output: Path) -> None:
    """The low-resolution model as transformers' own Llava classes, which every server knows."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava.model.load import load_model, load_processor

    source, processor = load_model(checkpoint, dtype="auto"), load_processor(checkpoint)
    config, side = source.config, processor.image_processor.resolution
    text_config = config.text_config.__class__.from_dict(config.text_config.to_dict())
    text_config.vocab_size = max(text_config.vocab_size, config.image_token_id + 1)
    stock = LlavaConfig(
        vision_config=config.vision_config, text_config=text_config, image_token_index=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", image_seq_length=(side // processor.image_processor.patch_size) ** 2,
        tie_word_embeddings=config.tie_word_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(stock)
    names = {
        "model.vision_tower.clip.": "model.vision_tower.",
        "model.projector.0.": "model.multi_modal_projector.linear_1.",
        "model.projector.2.": "model.multi_modal_projector.linear_2.",
    }
    tensors = {}
    for name, tensor in source.state_dict().items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), "")
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            # a row for the image token; the head's copies padding, which is never said
            filler = tensor[config.pad_token_id].expand(text_config.vocab_size - len(tensor), -1)
            tensor = torch.cat([tensor, filler])
        tensors[names.get(prefix, "") + name[len(prefix) :]] = tensor
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(output)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=list(config.image_mean), image_std=list(config.image_std),
    )  # fmt: skip
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.image_processor.patch_size,
        vision_feature_select_strategy="default",
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=1,
    ).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of this package")
    parser.add_argument("--output", required=True, help="folder to write")
    arguments = parser.parse_args()
    print(f"wrote {export(arguments.checkpoint, arguments.output)}")


if __name__ == "__main__":
    run_command(main)
