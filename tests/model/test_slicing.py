import json
import random
from pathlib import Path

import pytest
from PIL import Image

from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor
from llava.model.slicing import image_token_count, long_side_size, plan_slices

GOLDEN = json.loads((Path(__file__).parent / "golden_slices.json").read_text())["rows"]


def check(width, height, long_side, overview_size, grid, slice_size, visual_tokens):
    size = long_side_size(width, height, long_side) if long_side else (width, height)
    plan = plan_slices(*size)
    assert list(plan.overview_size) == overview_size
    assert (list(plan.grid) if plan.grid else None) == grid
    assert (list(plan.slice_size) if plan.slice_size else None) == slice_size
    assert image_token_count(plan.grid, 12) == visual_tokens


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row[0]}x{row[1]}-{row[2]}")
def test_golden_rows_measured_on_the_reference(row):
    check(*row)


def test_the_whole_golden_table_where_it_is_at_hand(real_data):
    rows = json.loads((real_data.parent / "reference" / "golden_slices.json").read_text())["rows"]
    keys = ("width", "height", "long_side", "overview_size", "grid", "slice_size", "visual_tokens")
    for row in rows:
        check(*(row[key] for key in keys))
    assert len(rows) == 428


def test_any_size_is_bounded_and_never_empty():
    rng = random.Random(0)
    sizes = [(1, 1), (1, 20000), (20000, 10), (3000, 1), (10, 20000), (5000, 3), (336, 336), (337, 336)]
    sizes += [(int(2 ** rng.uniform(0, 14)) or 1, int(2 ** rng.uniform(0, 14)) or 1) for _ in range(5000)]
    for width, height in sizes:
        plan = plan_slices(width, height)
        assert plan.slices <= 7
        assert plan.slices != 1
        for side in (plan.overview_size, plan.slice_size or plan.overview_size):
            assert min(side) >= 14
            assert side[0] % 14 == side[1] % 14 == 0
            assert (side[0] // 14) * (side[1] // 14) <= 576
        assert min(long_side_size(width, height, 1024)) >= 1


def test_slices_tile_the_image_and_tokens_follow_from_its_size(processor):
    rng = random.Random(1)
    processor.image_processor = LlavaUHDImageProcessor()
    processor.resampler_grid = 12
    for _ in range(2000):
        width, height = (int(2 ** rng.uniform(0, 14)) or 1 for _ in range(2))
        plan = plan_slices(width, height)
        assert len(processor.image_ids(width, height)) == image_token_count(plan.grid, 12)
        if plan.grid and max(width, height) < 700:
            pieces = processor.image_processor.cut(Image.new("RGB", (width, height)))
            assert {piece.size for piece in pieces[:-1]} == {plan.slice_size}
            assert len(pieces) == plan.slices + 1


def test_no_pixels_is_an_error():
    with pytest.raises(ValueError, match="0x5"):
        plan_slices(0, 5)
