"""Choosing the next token of each row. R rows, V vocabulary."""

import torch
from torch import Tensor

from llava.errors import UserError
from llava.generate.candidates import Sampling

LEADING = 1024  # likeliest tokens that are looked at before the whole vocabulary is sorted


def uniform_stream(seed: int, length: int) -> list[float]:
    """Numbers in [0, 1) that depend on the seed alone."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed)).tolist()


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token per row: greedy, or by inverse transform on the top-k / top-p part of the distribution.

    Args:
        logits: (R, V). uniform: (R,) in [0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / sampling.temperature
    total = scaled.logsumexp(-1, keepdim=True)
    if not bool(torch.isfinite(total).all()):
        raise UserError("the model's logits are no finite numbers. Fix: check the checkpoint")
    likeliest, tokens = leading(scaled, total, sampling)
    probabilities = (likeliest - total).exp()
    if sampling.top_k:  # what is left counts as the whole for top-p, as in transformers
        probabilities[:, sampling.top_k :] = 0
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)  # the first token always stays
    cumulative = probabilities.cumsum(-1)
    chosen = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    last_kept = (probabilities > 0).sum(-1) - 1  # rounding must not reach past it
    return tokens.gather(1, torch.minimum(chosen, last_kept)[:, None])[:, 0]


def leading(scaled: Tensor, total: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits in falling order (equal ones by token id) and their tokens: as many as top-k and top-p can keep.

    A vocabulary of 152,064 is not sorted for the few hundred tokens that matter, unless they do not suffice.
    """
    likely = min(scaled.shape[-1], max(LEADING, sampling.top_k))
    if likely < scaled.shape[-1]:
        values, tokens = scaled.topk(likely, dim=-1)
        mass = (values - total).exp().sum(-1)
        if sampling.top_k or (sampling.top_p < 1 and bool((mass > sampling.top_p).all())):
            tokens, order = tokens.sort(-1)
            values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
            return values, tokens.gather(-1, order)
    values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    return values, tokens
