"""Which parts of the model train: vision, projector, language. Everything else stays bit-identical.

Stage 1 trains the projector; stages 0, 1.5 and 2 train all three (paper, step 4). Parameters that the forward pass
never reaches (the tower's last layer, of which the features are not used) never train.
"""

from torch import nn

from llava.errors import UserError
from llava.model.modeling_llava_uhd import LlavaUHDForConditionalGeneration

PARTS = ("vision", "projector", "language")


def numbers(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds over all ranks: ZeRO-3 keeps a part on each, 4 bits put two into a byte."""
    if hasattr(parameter, "quant_state"):
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def part_modules(model: LlavaUHDForConditionalGeneration) -> dict[str, list[nn.Module]]:
    return {
        "vision": [model.model.vision_tower],
        "projector": [model.model.projector],
        "language": [model.model.language_model, model.lm_head],
    }


def set_trainable(model: LlavaUHDForConditionalGeneration, parts: list[str]) -> dict[str, int]:
    """Freeze everything, then release `parts`; returns the number of trainable parameters of each part.

    Raises UserError for an unknown part or an empty list.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(f"--train_parts is {','.join(parts)!r}; give some of {', '.join(PARTS)}, comma-separated")
    model.requires_grad_(False)
    modules = part_modules(model)
    for part in parts:
        for parameter in (p for module in modules[part] for p in module.parameters()):
            parameter.requires_grad_(parameter.is_floating_point())  # not those held in 4 bits
    for parameter in model.model.vision_tower.unused_parameters():
        parameter.requires_grad_(False)
    counts = {}
    for part in PARTS:
        parameters = {id(p): p for module in modules[part] for p in module.parameters()}.values()
        counts[part] = sum(numbers(p) for p in parameters if p.requires_grad)
    return counts
