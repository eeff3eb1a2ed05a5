"""How an image is cut into slices: pure integer geometry, standard library only.

An image larger than `resolution**2` pixels is shown to the vision tower twice: once as an *overview* (the whole
image at about `resolution**2` pixels) and once as a *grid* of slices, each again of at most that many pixels, so
that small things stay visible (LLaVA-UHD, "image modularization"). All sizes are (width, height) in pixels and
multiples of `patch`; grids are (columns, rows), as in the published code.

    plan_slices(640, 480)  ->  overview (378, 280), grid (2, 2), slice (378, 280)

Nothing here reads pixels. `image_processing_llava_uhd.py` does the cutting that is planned here.
"""

import math
from typing import NamedTuple

RESOLUTION = 336  # side of the square the vision tower was trained on
PATCH = 14
MAX_SLICES = 7


class SlicePlan(NamedTuple):
    """What becomes of one image. `grid` and `slice_size` are None when the image is shown as overview only."""

    overview_size: tuple[int, int]
    grid: tuple[int, int] | None
    slice_size: tuple[int, int] | None

    @property
    def slices(self) -> int:
        return self.grid[0] * self.grid[1] if self.grid else 0


def floor_to_multiple(length: int, multiple: int) -> int:
    """The largest multiple of `multiple` not above `length`, and at least one `multiple`."""
    return max(length // multiple, 1) * multiple


def target_size(width: int, height: int, resolution: int, patch: int, upscale: bool) -> tuple[int, int]:
    """The size at which a picture of this aspect is shown: at most `(resolution // patch)**2` patches.

    Both sides are floored to multiples of `patch`, so the aspect is kept approximately. The published rule lets the
    long side grow without bound once the short side has reached one patch (a 3000x1 picture asks for 1,285 patches);
    here the long side is cut back until the patch budget holds. Ordinary pictures are not touched by that bound.
    """
    if upscale or width * height > resolution * resolution:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)  # from the truncated height, as published
    columns = floor_to_multiple(width, patch) // patch
    rows = floor_to_multiple(height, patch) // patch
    budget = (resolution // patch) ** 2
    if columns * rows > budget:
        if columns > rows:
            columns = max(budget // rows, 1)
        else:
            rows = max(budget // columns, 1)
    return columns * patch, rows * patch


def long_side_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    """Width and height with the longer one made exactly `long_side` and the other truncated, never below 1."""
    if width >= height:
        return long_side, max(int(height * long_side / width), 1)
    return max(int(width * long_side / height), 1), long_side


def best_grid(width: int, height: int, wanted: int, max_slices: int) -> tuple[int, int]:
    """The (columns, rows) of about `wanted` slices whose shape is nearest to the image's in log aspect ratio.

    Candidates are all factor pairs of wanted-1, wanted and wanted+1, except one slice and more than `max_slices`.
    The first of equals wins; exact ties are decided by floating point, as in the published code.
    """
    log_ratio = math.log(width / height)
    best, smallest_error = (1, 1), math.inf
    for count in (wanted - 1, wanted, wanted + 1):
        if count == 1 or count > max_slices:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            error = abs(log_ratio - math.log(columns / (count // columns)))
            if error < smallest_error:
                best, smallest_error = (columns, count // columns), error
    return best


def plan_slices(
    width: int,
    height: int,
    resolution: int = RESOLUTION,
    patch: int = PATCH,
    max_slices: int = MAX_SLICES,
) -> SlicePlan:
    """Decide overview size, grid and slice size of a `width` x `height` image.

    Raises:
        ValueError: a side is below 1 pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels cannot be sliced; both sides must be at least 1")
    wanted = min(math.ceil(width * height / (resolution * resolution)), max_slices)
    if wanted <= 1:
        return SlicePlan(target_size(width, height, resolution, patch, upscale=True), None, None)
    overview = target_size(width, height, resolution, patch, upscale=False)
    columns, rows = best_grid(width, height, wanted, max_slices)
    cell = (max(width // columns, 1), max(height // rows, 1))
    return SlicePlan(overview, (columns, rows), target_size(*cell, resolution, patch, upscale=True))


def image_token_count(grid: tuple[int, int] | None, queries_per_side: int) -> int:
    """Length of one image in the token sequence, separators included, for a resampler of `queries_per_side`**2 queries.

    Sliced: every feature row of the stitched map ends in a newline, a comma follows, the overview comes last.

        image_token_count((2, 2), 12)  ->  4*144 + 2*12 + 1 + 144 = 745
    """
    overview = queries_per_side * queries_per_side
    if grid is None:
        return overview
    columns, rows = grid
    return columns * rows * overview + rows * queries_per_side + 1 + overview
