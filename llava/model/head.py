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
    """Hidden states -> logits, or with `targets` -> cross-entropy. One call whatever the number of tokens:
    under ZeRO-3 all ranks must call a module equally often.

    `fused_loss`, when set, is a kernel that takes (weight, hidden, targets) and gives the same sum.
    """

    fused_loss = None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, each: bool = False) -> Tensor:
        """
        Args:
            hidden: (..., C); with targets (N, C), the states of labelled positions only.
            targets: (N,) token ids.
            each: the targets' own losses instead of their sum.

        Returns:
            (..., vocabulary) logits, or -log p(target) in float32: the scalar sum, or (N,).
        """
        if targets is None:
            return super().forward(hidden)
        if self.fused_loss is not None and not each:
            return self.fused_loss(self.weight, hidden, targets)
        reduction = "none" if each else "sum"
        if len(hidden) <= CHUNK:
            return self.chunk_loss(hidden, targets, reduction)
        pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        if torch.is_grad_enabled():
            parts = [checkpoint(self.chunk_loss, *piece, reduction, use_reentrant=False) for piece in pieces]
        else:
            parts = [self.chunk_loss(*piece, reduction) for piece in pieces]
        return torch.cat(parts) if each else torch.stack(parts).sum()

    def chunk_loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(super().forward(hidden).float(), targets, reduction=reduction)
