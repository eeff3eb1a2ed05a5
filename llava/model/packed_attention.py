"""Attention over several sequences in one row, each seeing only itself: registered as `packed_sdpa`.

Used in training where flash attention is not installed (it has such a form of its own). Every sequence runs through
PyTorch's scaled dot product attention as if it were alone: no mask is built and no padding computed.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: list[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention of (1, heads, T, width) within consecutive sequences of `lengths`; returns (1, T, heads, width).

    Raises:
        ValueError: `lengths` is missing; the batch was not packed.
    """
    if lengths is None:
        raise ValueError("packed_sdpa wants a packed batch with cu_seq_lens; use attn_implementation sdpa for others")
    pieces = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def no_mask(*args, **kwargs) -> None:
    """What a sequence may see follows from `lengths`."""


AttentionInterface.register("packed_sdpa", packed_sdpa)
AttentionMaskInterface.register("packed_sdpa", no_mask)
