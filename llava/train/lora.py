"""LoRA and QLoRA (peft): train small additions to the language model's linear layers, and merge them in at the end.

The additions live inside the model while it trains; what a stage writes is a complete checkpoint, as without LoRA. QLoRA
holds the language model's layers in 4 bits while it trains, and adds what it learned to the whole weights.
"""

import torch

from llava.errors import UserError

# attention and MLP of every layer; the tower has layers of the same names and is not touched
TARGETS = r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


def four_bit(dtype: torch.dtype):
    """transformers' quantisation of the language model to NF4, computing in `dtype` (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--four_bit needs bitsandbytes. Fix: run `bash training_scripts/setup.sh train qlora`")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.vision_tower", "model.projector", "lm_head"],
    )


def add_lora(model, rank: int, alpha: int, dropout: float):
    """Freeze the language model and put trainable additions of `rank` into it; returns what `merge` undoes.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise UserError(f"--lora_rank needs peft ({error}). Fix: run `bash training_scripts/setup.sh train`") from error
    model.lm_head.requires_grad_(False)
    model.is_quantized = False  # the Trainer knows additions only as a PeftModel, and refuses a 4-bit model without
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS)
    return LoraModel(model.model.language_model, {"default": config}, "default")


def merge(tuner) -> None:
    """Add what was learned to the weights; the language model has its own layers again."""
    tuner.merge_and_unload()


@torch.no_grad()
def merge_into(model, trained) -> None:
    """Add what a 4-bit model learned to `model`, the same checkpoint in full precision.

    Args:
        trained: the model that `add_lora` was called on. Its additions are added, its other trained parameters copied.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in trained.named_modules():
        if isinstance(layer, LoraLayer):
            weight = model.get_submodule(name).weight
            weight += layer.get_delta_weight("default").to(weight)
    parameters = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameters[name].copy_(parameter)
