"""The resampler against a straightforward RoIAlign-per-region form written from its description."""

import math

import pytest
import torch
from torch.nn import functional as F

from llava.model.resampler import MlpProjector, SpatialResampler, pooled_size, sincos_positions
from llava.model.slicing import plan_slices
from tests.benchmarks.model import gather_roi_align, plain_attention, resample_one_by_one


def bilinear(grid, y, x):
    """(C,) value of grid (C, h, w) at a point; zero outside by more than one cell, as RoIAlign defines."""
    height, width = grid.shape[1:]
    if y < -1 or y > height or x < -1 or x > width:
        return torch.zeros(grid.shape[0])
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = int(y), int(x)
    if y0 >= height - 1:
        y0 = y = height - 1
    if x0 >= width - 1:
        x0 = x = width - 1
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    dy, dx = y - y0, x - x0
    return (
        grid[:, y0, x0] * (1 - dy) * (1 - dx)
        + grid[:, y0, x1] * (1 - dy) * dx
        + grid[:, y1, x0] * dy * (1 - dx)
        + grid[:, y1, x1] * dy * dx
    )


def roi_align(grid, box, bins, aligned):
    """(C, bins) averages of adaptive samples in one box (x0, y0, x1, y1)."""
    shift = 0.5 if aligned else 0.0
    x0, y0, x1, y1 = (value - shift for value in box)
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    rows, columns = bins
    ny, nx = math.ceil(height / rows), math.ceil(width / columns)
    out = []
    for row in range(rows):
        for column in range(columns):
            points = [
                bilinear(
                    grid,
                    y0 + height / rows * (row + (i + 0.5) / ny),
                    x0 + width / columns * (column + (j + 0.5) / nx),
                )
                for i in range(ny)
                for j in range(nx)
            ]
            out.append(torch.stack(points).mean(0))
    return torch.stack(out, dim=1)


def straightforward(module, features, shape):
    """One slice (h*w, D) through the resampler, region by region."""
    rows, columns = shape
    g, width = module.grid, module.query.shape[1]
    x = module.ln_kv(module.kv_proj(features))
    positions = F.interpolate(
        module.pos_embed.T.reshape(1, width, g, g), size=shape, mode="bicubic", align_corners=False
    )[0]
    values = x.T.reshape(width, rows, columns)
    keys = values + positions
    queries = module.ln_q(module.query) + module.pos_embed
    bins = pooled_size(rows, columns)
    out, attention = [], plain_attention(module)
    for index in range(g * g):
        row, column = divmod(index, g)
        box = (column * columns / g, row * rows / g, (column + 1) * columns / g, (row + 1) * rows / g)
        key = roi_align(keys, box, bins, module.aligned).T[:, None]
        value = roi_align(values, box, bins, module.aligned).T[:, None]
        attended, _ = attention(queries[index][None, None], key, value)
        out.append(module.ln_post(attended[0, 0]) @ module.proj)
    return torch.stack(out)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3), (2, 7), (5, 4), (1, 12), (8, 6)])
def test_equals_roi_align_per_region(shape, aligned):
    torch.manual_seed(0)
    module = SpatialResampler(vision_width=12, width=16, grid=4, heads=2, aligned=aligned).eval()
    module.reset_parameters()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, shape[0] * shape[1], 12)
    with torch.no_grad():
        ours = module(features.flatten(0, 1), [shape] * len(features)).unflatten(0, (len(features), -1))
        for index in range(2):
            torch.testing.assert_close(
                ours[index], straightforward(module, features[index], shape), atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("aligned", [False, True])
def test_gathering_corners_is_roi_align(aligned):
    grid = torch.randn(5, 4, 7)
    gathered = gather_roi_align(grid, 3, (2, 4), aligned)
    for index in range(9):
        row, column = divmod(index, 3)
        box = (column * 7 / 3, row * 4 / 3, (column + 1) * 7 / 3, (row + 1) * 4 / 3)
        torch.testing.assert_close(gathered[index], roi_align(grid, box, (2, 4), aligned).T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
def test_every_feasible_slice_shape_at_the_published_grid(aligned):
    """Each shape that some image is cut into, through the 12x12 resampler, against the gathered form above."""
    torch.manual_seed(0)
    module = SpatialResampler(vision_width=8, width=8, grid=12, heads=2, aligned=aligned).eval()
    module.reset_parameters()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    shapes, sides = set(), [round(20 * 1.05**step) for step in range(120)]  # 20 to 6,650 pixels
    for width in sides:
        for height in sides:
            plan = plan_slices(width, height)
            shapes |= {(size[1] // 14, size[0] // 14) for size in (plan.overview_size, plan.slice_size) if size}
    assert len(shapes) > 400
    with torch.no_grad():
        for shape in sorted(shapes):
            features = torch.randn(1, shape[0] * shape[1], 8)
            expected = resample_one_by_one(module, features, shape)
            torch.testing.assert_close(
                module(features.flatten(0, 1), [shape] * len(features)).unflatten(0, (len(features), -1)),
                expected,
                atol=1e-5,
                rtol=1e-4,
                msg=lambda m, s=shape: f"{s}: {m}",
            )


def test_published_parameter_names_and_shapes():
    module = SpatialResampler(vision_width=1024, width=3584, grid=12, heads=28, aligned=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "query": (144, 3584), "pos_embed": (144, 3584), "proj": (3584, 3584), "kv_proj.weight": (3584, 1024),
        "attn.in_proj_weight": (10752, 3584), "attn.in_proj_bias": (10752,),
        "attn.out_proj.weight": (3584, 3584), "attn.out_proj.bias": (3584,),
        "ln_q.weight": (3584,), "ln_q.bias": (3584,), "ln_kv.weight": (3584,), "ln_kv.bias": (3584,),
        "ln_post.weight": (3584,), "ln_post.bias": (3584,),
    }  # fmt: skip
    assert sum(tensor.numel() for tensor in module.state_dict().values()) == 68_963_328


@pytest.mark.parametrize(
    ("columns_over_rows", "bins"),
    [((10, 20), (4, 2)), ((13, 20), (3, 2)), ((16, 20), (4, 3)), ((20, 20), (3, 3)), ((26, 20), (3, 4)), ((32, 20), (2, 3)), ((40, 20), (2, 4))],
)  # fmt: skip
def test_pooled_sizes_follow_the_published_thresholds(columns_over_rows, bins):
    columns, rows = columns_over_rows
    assert pooled_size(rows, columns) == bins


def test_positions_encode_the_column_first():
    table = sincos_positions(8, 3).view(3, 3, 8)  # row, column, width
    assert torch.equal(table[0, 1, :4], table[2, 1, :4])
    assert torch.equal(table[1, 0, 4:], table[1, 2, 4:])
    torch.testing.assert_close(
        table[0, 1, :4], torch.tensor([math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)])
    )


def test_positions_do_not_train():
    module = SpatialResampler(8, 16, 3, 2, aligned=True)
    module.requires_grad_(True)
    assert "pos_embed" not in dict(module.named_parameters())


def test_mlp_projector_keeps_every_patch():
    module = MlpProjector(1024, 3584)
    assert sum(parameter.numel() for parameter in module.parameters()) == 16_522_240
    assert MlpProjector(8, 16)(torch.randn(48, 8), [(6, 6), (3, 4)]).shape == (48, 16)
