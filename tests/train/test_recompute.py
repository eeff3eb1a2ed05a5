"""Gradient checkpointing: the same numbers, and how much is computed twice."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava.train.recompute import checkpointing_kwargs
from tests.benchmarks.training import batch_of, build, packed_step


@pytest.fixture(scope="module")
def steps():
    """Recomputation -> (gradients, operations of one step)."""
    model, batch, seen = build(), batch_of(packing=True), {}
    for kind in ("none", "selective", "full"):
        model.gradient_checkpointing_disable()
        if kind != "none":
            model.gradient_checkpointing_enable(checkpointing_kwargs(kind == "selective"))
        with FlopCounterMode(display=False) as counter:
            packed_step(model, batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen[kind] = gradients, counter.get_total_flops()
    return seen


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_bit_equal(steps, kind):
    for name, gradient in steps["none"][0].items():
        assert torch.equal(gradient, steps[kind][0][name]), name


def test_selective_computes_the_widening_products_again_and_nothing_else(steps):
    none, selective, full = (steps[kind][1] for kind in ("none", "selective", "full"))
    config, tokens = build().config, batch_of(packing=True)["input_ids"].numel()
    text, vision = config.text_config, config.vision_config
    patches = 4 * (64 + 1)
    again = 2 * tokens * text.hidden_size * text.intermediate_size * 2 * text.num_hidden_layers
    again += 2 * patches * vision.hidden_size * vision.intermediate_size * (vision.num_hidden_layers - 1)
    assert selective - none == again
    assert full > selective
