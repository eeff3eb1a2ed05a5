"""The LM head, with a loss that never holds all logits.

A vocabulary of 152,064 in float32 takes 0.6 MB a token, several times over. In the loss, logits of `CHUNK` positions
exist at a time; the backward pass computes them again. Equal to the plain cross-entropy up to summation order.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions


class LanguageModelHead(nn.Linear):
    """Hidden states -> logits, or with `targets` -> summed cross-entropy. One call whatever the number of tokens:
    under ZeRO-3 all ranks must call a module equally often.

    `fused_loss`, when set, is a kernel that takes (weight, hidden, targets) and gives the same sum.
    """

    fused_loss = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden: (..., C); with targets (N, C), the states of labelled positions only.
            targets: (N,) token ids.

        Returns:
            (..., vocabulary) logits, or the scalar sum of -log p(target) in float32.
        """
        if targets is None:
            return super().forward(hidden)
        if self.fused_loss is not None:
            return self.fused_loss(self.weight, hidden, targets)
        if len(hidden) <= CHUNK or not torch.is_grad_enabled():
            return self.chunk_loss(hidden, targets)
        parts = [
            checkpoint(self.chunk_loss, piece, wanted, use_reentrant=False)
            for piece, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        return torch.stack(parts).sum()

    def chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(hidden).float(), targets, reduction="sum")
