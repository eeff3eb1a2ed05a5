"""Attention over several sequences in one row, each seeing only itself: registered as `packed_sdpa`.

Used by the tower over slices, and by the language model in training, where flash attention is not installed (it has
such a form of its own). Neighbours of equal length run as one dense batch of PyTorch's scaled dot product attention:
no mask is built and no padding computed. Every module is called once whatever the lengths, as ZeRO-3 needs: there all
ranks must call a module equally often.
"""

from itertools import groupby

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED_SDPA = "packed_sdpa"


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
    """Attention of (1, heads, T, width) within consecutive sequences of `lengths`, causal where the module is.

    Returns (1, T, heads, width).

    Raises:
        ValueError: `lengths` is missing; the batch was not packed.
    """
    if lengths is None:
        raise ValueError("packed_sdpa wants a packed batch with cu_seq_lens; use attn_implementation sdpa for others")
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]
    spans = [length * count for length, count in runs]
    pieces = []
    for (length, _), *parts in zip(
        runs, query.split(spans, 2), key.split(spans, 2), value.split(spans, 2), strict=True
    ):
        q, k, v = (part[0].unflatten(1, (-1, length)).transpose(0, 1) for part in parts)  # (run, heads, length, width)
        attended = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=module.is_causal, scale=scaling, enable_gqa=True
        )
        pieces.append(attended.transpose(1, 2).flatten(0, 1))  # (run * length, heads, width)
    return torch.cat(pieces)[None], None


def no_mask(*args, **kwargs) -> None:
    """What a sequence may see follows from `lengths`."""


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, no_mask)
