"""LoRA (peft): train small additions to the language model's linear layers, and merge them in at the end.

The additions live inside the model while it trains, so checkpoints, resume and packing work as ever; what a stage
writes is a complete checkpoint, as without LoRA.
"""

from llava.errors import UserError

# attention and MLP of every layer; the tower has layers of the same names and is not touched
TARGETS = r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


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
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS)
    return LoraModel(model.model.language_model, {"default": config}, "default")


def merge(tuner) -> None:
    """Add what was learned to the weights; the language model has its own layers again."""
    tuner.merge_and_unload()
