"""Projectors: vision features of one slice -> tokens of the language model's width.

`SpatialResampler` (LLaVA-UHD v1): a grid of learned queries; each query looks only at its own region of the slice,
pooled to 6-12 bins by RoIAlign. On a regular grid RoIAlign is linear and separable, so it is two small matrices per
slice shape, and because it is linear, keys and values are projected before pooling (cheaper, exact).

Shapes: S slices of one shape, h x w patches, D vision width, C language-model width, g queries a side, Q = g*g,
p x q bins a region.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (columns, rows) of bins per region; the entry nearest to the slice's aspect in log ratio is used, first wins.
POOLED_SIZES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))


def pooled_size(rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of bins in which a region of a rows x columns slice is pooled."""
    ratio = math.log(columns / rows)
    best = min(POOLED_SIZES, key=lambda size: abs(ratio - math.log(size[0] / size[1])))
    return best[1], best[0]


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # kept matrices serve training too, whoever asked first
def roi_matrix(length: int, regions: int, bins: int, aligned: bool) -> Tensor:
    """(regions * bins, length) float32: RoIAlign along one axis as a matrix.

    The axis of `length` cells is cut in `regions` equal boxes and each box in `bins`; a bin averages
    ceil(box / bins) samples, each interpolated linearly between two cells (adaptive sampling, spatial scale 1).
    Without `aligned` coordinates carry no half-cell shift and a box is at least one cell long; samples past the end
    count as zero, as in torchvision.
    """
    matrix = torch.zeros(regions * bins, length, dtype=torch.float64)
    offset = 0.5 if aligned else 0.0
    box = length / regions if aligned else max(length / regions, 1.0)
    samples = max(math.ceil(box / bins), 1)
    for region in range(regions):
        start = region * length / regions - offset
        for index in range(bins):
            for sample in range(samples):
                at = start + box * (index + (sample + 0.5) / samples) / bins
                if at < -1.0 or at > length:
                    continue
                at = min(max(at, 0.0), length - 1.0)
                low = int(at)
                high = min(low + 1, length - 1)
                row = matrix[region * bins + index]
                row[low] += (1 - (at - low)) / samples
                row[high] += (at - low) / samples
    return matrix.float()


def sincos_positions(width: int, side: int) -> Tensor:
    """(side*side, width): first half encodes the column, second the row; each half is a sin block, then a cos block."""
    quarter = width // 4
    frequency = 10000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns = axis[None].expand(side, -1, -1)
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, -1).float()


class RegionAttention(nn.MultiheadAttention):
    """Multi-head attention in which each query has its own few keys, pooled after the projection."""

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, shapes: list[tuple[int, int]],
        pool: Callable[[Tensor, tuple[int, int]], Tensor],
    ) -> Tensor:  # fmt: skip
        """
        Args:
            queries: (Q, C).
            keys, values: (P, C), the patches of N slices one after another.
            pool: (S, h*w, C) of slices of one shape -> (S, Q, bins, C).

        Returns:
            (N, Q, C).
        """
        heads, width = self.num_heads, self.embed_dim
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        q = F.linear(queries, q_weight, q_bias).view(-1, heads, 1, width // heads)  # (Q, heads, 1, C/heads)
        counts = [rows * columns for rows, columns in shapes]
        k, v = (F.linear(x, weight).split(counts) for x, weight in ((keys, k_weight), (values, v_weight)))
        attended: list[Tensor | None] = [None] * len(shapes)
        for shape in dict.fromkeys(shapes):  # all slices of one shape at once
            members = [index for index, other in enumerate(shapes) if other == shape]
            pooled = (
                pool(torch.stack([each[index] for index in members]), shape) + bias
                for each, bias in ((k, k_bias), (v, v_bias))
            )  # (S, Q, bins, C) each
            k_bins, v_bins = (x.unflatten(-1, (heads, -1)).transpose(2, 3) for x in pooled)
            out = F.scaled_dot_product_attention(q.expand(len(members), -1, -1, -1, -1), k_bins, v_bins)
            for index, each in zip(members, out.flatten(2).unbind(), strict=True):  # (S, Q, heads, 1, C/heads)
                attended[index] = each
        return self.out_proj(torch.stack(attended))


class SpatialResampler(nn.Module):
    """g*g queries cross-attend to their own region of a slice. Parameter names are the published ones."""

    def __init__(self, vision_width: int, width: int, grid: int, heads: int, aligned: bool):
        super().__init__()
        if width % 4:
            raise ValueError(f"the language model's width {width} must be a multiple of 4 for 2-D positions")
        self.grid, self.aligned = grid, aligned
        self.query = nn.Parameter(torch.zeros(grid * grid, width))
        self.register_buffer("pos_embed", sincos_positions(width, grid))
        same = vision_width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(vision_width, width, bias=False)
        self.attn = RegionAttention(width, heads)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Parameter(torch.zeros(width, width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation, called by the model's `_init_weights`."""
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.attn.in_proj_weight, std=0.02)
        nn.init.trunc_normal_(self.attn.out_proj.weight, std=0.02)
        if isinstance(self.kv_proj, nn.Linear):
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)
        nn.init.zeros_(self.attn.in_proj_bias)
        nn.init.zeros_(self.attn.out_proj.bias)
        nn.init.normal_(self.proj, std=self.proj.shape[0] ** -0.5)
        for norm in (self.ln_q, self.ln_kv, self.ln_post):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        self.pos_embed.copy_(sincos_positions(self.query.shape[1], self.grid))

    def tokens(self, shape: tuple[int, int]) -> int:
        return self.grid * self.grid

    def forward(self, features: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(P, D) features of N slices of shapes (h, w), one after another -> (N * Q, C) tokens."""
        values = self.ln_kv(self.kv_proj(features))  # (P, C)
        positions = {shape: self.resized_positions(shape).to(values.dtype) for shape in dict.fromkeys(shapes)}
        keys = values + torch.cat([positions[shape] for shape in shapes])
        queries = self.ln_q(self.query) + self.pos_embed.to(self.query.dtype)  # (Q, C)
        attended = self.attn(queries, keys, values, shapes, self.pool)  # (N, Q, C)
        return (self.ln_post(attended) @ self.proj).flatten(0, 1)

    def pool(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """RoIAlign of (S, h*w, C) to the bins of every region: (S, Q, p*q, C)."""
        rows, columns = shape
        p, q = pooled_size(rows, columns)
        down = roi_matrix(rows, self.grid, p, self.aligned).to(x)  # (g*p, h)
        across = roi_matrix(columns, self.grid, q, self.aligned).to(x)  # (g*q, w)
        x = torch.einsum("ah,shwc->sawc", down, x.unflatten(1, (rows, columns)))
        x = torch.einsum("bw,sawc->sabc", across, x)  # (S, g*p, g*q, C)
        x = x.unflatten(2, (self.grid, q)).unflatten(1, (self.grid, p))  # (S, g, p, g, q, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def resized_positions(self, shape: tuple[int, int]) -> Tensor:
        """(h*w, C) float32: the query grid's positions resized bicubically to the slice."""
        square = self.pos_embed.float().T.reshape(1, -1, self.grid, self.grid)
        return F.interpolate(square, size=shape, mode="bicubic", align_corners=False).flatten(2)[0].T


class MlpProjector(nn.Sequential):
    """`mlp2x_gelu`: Linear, GELU, Linear for every patch (LLaVA-1.5); one token a patch."""

    def __init__(self, vision_width: int, width: int):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def tokens(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1]

    def forward(self, features: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(P, D) features of slices of any shapes -> (P, C) tokens."""
        return super().forward(features)
