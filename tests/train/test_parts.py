import copy

import pytest
import torch
from PIL import Image

from llava.errors import UserError
from llava.train.parts import part_modules, set_trainable


@pytest.mark.parametrize("parts", [["projector"], ["vision", "projector", "language"], ["language"]])
def test_trained_parts_move_and_frozen_ones_stay_bit_identical(model, processor, parts):
    counts = set_trainable(model, parts)
    assert {part for part, count in counts.items() if count} == set(parts)
    before = copy.deepcopy(model.state_dict())
    model.train()
    text = processor.prompt([{"role": "user", "content": "<image>\nWhat color?"}]) + "red"
    inputs = processor(images=[Image.effect_noise((90, 90), 80).convert("RGB")], text=[text])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    after = model.state_dict()
    unused = {id(parameter) for parameter in model.model.vision_tower.unused_parameters()}
    for part, modules in part_modules(model).items():
        for module in modules:
            for name, parameter in module.named_parameters():
                full = next(key for key, value in model.named_parameters() if value is parameter)
                same = torch.equal(before[full], after[full])
                expected = part not in parts or id(parameter) in unused
                assert same == expected or (not same and part in parts), (part, name)
                if part not in parts or id(parameter) in unused:
                    assert same, (part, name)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(moved) >= 0.9 * len(trainable)  # a key bias has no gradient under softmax
    assert torch.equal(before["model.projector.pos_embed"], after["model.projector.pos_embed"])


def test_unknown_part_is_named(model):
    with pytest.raises(UserError, match="visoin"):
        set_trainable(model, ["visoin"])
