"""Cross-entropy over a large vocabulary without holding all its logits.

A vocabulary of 152,064 in float32 takes 0.6 MB a token, several times over. Here logits of `CHUNK` positions exist at
a time; the backward pass computes them again. Equal to the plain loss up to summation order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions


def chunk_loss(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Summed cross-entropy of (n, C) hidden states against (n,) targets."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def summed_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Sum of -log p(target) over all positions, in float32.

    Args:
        hidden: (N, C) hidden states of labelled positions only.
        targets: (N,) token ids.
        head: the LM head, (n, C) -> (n, vocabulary).
    """
    if len(hidden) <= CHUNK or not torch.is_grad_enabled():
        return chunk_loss(hidden, targets, head)
    parts = [
        checkpoint(chunk_loss, piece, wanted, head, use_reentrant=False)
        for piece, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum()
