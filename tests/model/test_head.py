"""The LM head's loss: chunks, and Liger's kernel in Triton's interpreter, against plain cross-entropy."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from llava.model import head
from llava.model.head import LanguageModelHead


def plain_and_own(own: LanguageModelHead) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sum, gradient of the states and of the weight: (plain, own) each."""
    hidden = torch.randn(37, 64, requires_grad=True)
    targets = torch.randint(0, 500, (37,))
    results = []
    for loss in (F.cross_entropy(hidden @ own.weight.T, targets, reduction="sum"), own(hidden, targets)):
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, own.weight))))
    return list(zip(*results, strict=True))


def test_chunks_change_nothing(monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 10)
    torch.manual_seed(0)
    for plain, own in plain_and_own(LanguageModelHead(64, 500, bias=False)):
        torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-5)


def test_ligers_loss_is_the_same():
    pytest.importorskip("liger_kernel", reason="the extra `liger` is not installed")
    code = (
        "import torch\n"
        "from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss\n"
        "from tests.model.test_head import LanguageModelHead, plain_and_own\n"
        "torch.manual_seed(0)\n"
        "own = LanguageModelHead(64, 500, bias=False)\n"
        "own.fused_loss = LigerFusedLinearCrossEntropyLoss(reduction='sum').forward\n"
        "own.chunk_loss = None  # the path without the kernel is not taken\n"
        "for plain, other in plain_and_own(own):\n"
        "    torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
