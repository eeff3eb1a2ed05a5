"""Attention for decoding many continuations of few prompts: what they share is read once, registered as `shared_prefix`.

Rows (continuations) of one place (an image with the start of its prompt) attend to the same keys and values, so their
queries are stacked and multiplied with them together; each row's own tokens lie in a store of its own, written in
place. The two parts are joined by their log-sum-exp, which gives the attention over all of it.

Shapes: R rows, T new tokens a row, G places, H heads, K key/value heads, D width of a head.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from llava.model.packed_attention import no_mask

SHARED_PREFIX = "shared_prefix"


class Store:
    """Keys and values of every layer in one tensor each: (layers, slots, K, length, D); grows when asked to."""

    def __init__(self, like: Tensor, layers: int, slots: int):
        """`like`: keys of one layer, (1, K, any, D), for heads, width, type and device."""
        shape = (layers, slots, like.shape[1], 0, like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def reserve(self, length: int = 0, slots: int = 0) -> None:
        """Room for `length` tokens in each of `slots` slots; grows by half at least, so that copies stay few."""
        for axis, wanted in ((1, slots), (3, length)):
            have = self.keys.shape[axis]
            if wanted > have:
                shape = list(self.keys.shape)
                shape[axis] = max(wanted, have * 3 // 2) - have
                pad = self.keys.new_zeros(shape)
                self.keys, self.values = torch.cat([self.keys, pad], axis), torch.cat([self.values, pad], axis)

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Tokens into a slot from its start: (layers, K, length, D) each."""
        self.reserve(length=keys.shape[2])
        self.keys[:, slot, :, : keys.shape[2]] = keys
        self.values[:, slot, :, : keys.shape[2]] = values

    def move(self, source: int, target: int, length: int) -> None:
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


class Rows:
    """What one forward pass attends to; handed to the model as `rows`.

    Args:
        prefixes, own: the stores. Row r is slot r of `own`.
        places: (R,) slot of each row's prefix.
        prefix_lengths: (G,) tokens of every place.
        lengths: (R,) tokens each row has of its own before this pass.
    """

    def __init__(self, prefixes: Store, own: Store, places: Tensor, prefix_lengths: Tensor, lengths: Tensor):
        self.prefixes, self.own, self.places, self.lengths = prefixes, own, places, lengths
        self.groups = int(places.max()) + 1
        counts = torch.bincount(places, minlength=self.groups)
        self.lanes = int(counts.max())
        order = places.argsort(stable=True)
        first = (counts.cumsum(0) - counts)[places[order]]
        lane = torch.empty_like(places)
        lane[order] = torch.arange(len(places), device=places.device) - first
        self.lane_of_row = places * self.lanes + lane  # (R,) where a row stands among groups x lanes
        self.longest_prefix = int(prefix_lengths[: self.groups].max())
        self.longest_own = int(lengths.max())
        reach = torch.arange(self.longest_prefix, device=places.device)
        self.beyond_prefix = reach >= prefix_lengths[: self.groups, None]  # (G, longest)
        self.row = torch.arange(len(places), device=places.device)

    def advance(self) -> None:
        """Every row has one token more; rows and places stay."""
        self.lengths = self.lengths + 1
        self.longest_own += 1


def shared_prefix(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    rows: Rows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of R x T new tokens to their prefix and to their row, themselves included: (R, T, H, D).

    Writes the new keys and values behind each row's own tokens.
    """
    layer, (count, heads, new, width) = module.layer_idx, query.shape
    kv_heads = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    longest = rows.longest_own + new
    keys, values = rows.own.keys[layer], rows.own.values[layer]  # (slots, K, capacity, D)
    places = rows.lengths[:, None] + torch.arange(new, device=query.device)  # (R, T)
    keys[rows.row[:, None], :, places] = key.transpose(1, 2)
    values[rows.row[:, None], :, places] = value.transpose(1, 2)
    reach = torch.arange(longest, device=query.device)
    beyond = reach > places[:, :, None]  # (R, T, longest): what comes after the token itself
    stacked = query.reshape(count, kv_heads, -1, width)  # (R, K, heads per K * T, D)
    beyond = beyond[:, None].expand(count, heads // kv_heads, new, longest).flatten(1, 2)[:, None]
    out, weight = attend(stacked, keys[:count, :, :longest], values[:count, :, :longest], beyond, scaling)

    lanes = query.new_zeros(rows.groups * rows.lanes, *stacked.shape[1:])
    lanes[rows.lane_of_row] = stacked
    grouped = lanes.view(rows.groups, rows.lanes, *stacked.shape[1:]).transpose(1, 2).flatten(2, 3)
    prefix_keys = rows.prefixes.keys[layer, : rows.groups, :, : rows.longest_prefix]
    prefix_values = rows.prefixes.values[layer, : rows.groups, :, : rows.longest_prefix]
    shared, shared_weight = attend(grouped, prefix_keys, prefix_values, rows.beyond_prefix[:, None, None], scaling)
    per_lane = (rows.groups, kv_heads, rows.lanes, -1)
    shared = shared.view(*per_lane, width).transpose(1, 2).flatten(0, 1)[rows.lane_of_row]
    shared_weight = shared_weight.view(per_lane).transpose(1, 2).flatten(0, 1)[rows.lane_of_row]

    share = torch.sigmoid(shared_weight - weight)[..., None]  # of the prefix in the whole softmax
    joined = torch.lerp(out.float(), shared.float(), share).to(query.dtype)
    return joined.view(count, heads, new, width).transpose(1, 2), None


def attend(query: Tensor, keys: Tensor, values: Tensor, beyond: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its denominator: (..., queries, D) and (..., queries), float32.

    Scores are made in float32: Qwen2's biases make some so large that bfloat16 would round differences away.
    """
    scores = query.float() @ keys.float().transpose(-1, -2) * scaling
    scores = scores.masked_fill(beyond, -torch.inf)
    weight = scores.logsumexp(-1)
    return (scores - weight[..., None]).exp().to(values.dtype) @ values, weight


AttentionInterface.register(SHARED_PREFIX, shared_prefix)
AttentionMaskInterface.register(SHARED_PREFIX, no_mask)
