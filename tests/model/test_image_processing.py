import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.image_processing_llava_uhd import LlavaUHDImageProcessor, patchify
from llava.model.slicing import plan_slices


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unpatchify(patches, rows, columns, patch):
    cells = patches.reshape(rows, columns, 3, patch, patch).transpose(0, 3, 1, 4, 2)
    return cells.reshape(rows * patch, columns * patch, 3)


def test_patches_reassemble_to_the_image():
    image = noise(56, 42)
    assert (unpatchify(patchify(image, 14), 3, 4, 14) == np.asarray(image)).all()


def test_slices_tile_the_resized_image_in_row_major_order():
    processor, image = LlavaUHDImageProcessor(), noise(800, 600)
    plan = plan_slices(800, 600)
    assert plan.grid == (3, 2)
    *slices, overview = processor.cut(image)
    width, height = plan.slice_size
    whole = Image.new("RGB", (3 * width, 2 * height))
    for index, piece in enumerate(slices):
        whole.paste(piece, (index % 3 * width, index // 3 * height))
    assert np.array_equal(whole, image.resize(whole.size, Image.Resampling.BICUBIC))
    assert overview.size == plan.overview_size


def test_packed_batch_is_the_concatenation_of_single_images():
    processor = LlavaUHDImageProcessor(resolution=48, patch_size=8)
    images = [noise(100, 84, 1), noise(40, 40, 2), noise(150, 50, 3)]
    batch = processor(images)
    singles = [processor(image) for image in images]
    for key in ("pixel_values", "slice_shapes", "grids"):
        assert torch.equal(batch[key], torch.cat([single[key] for single in singles])), key
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["grids"].tolist() == [[2, 2], [0, 0], [1, 3]]
    assert len(batch["slice_shapes"]) == (4 + 1) + 1 + (3 + 1)


@pytest.mark.parametrize("mode", ["uhd", "overview", "square"])
def test_layout_is_known_from_the_size_alone(mode):
    processor = LlavaUHDImageProcessor(image_mode=mode, resolution=48, patch_size=8)
    for width, height in [(48, 48), (100, 84), (150, 50), (336, 48), (9, 300)]:
        grid, shapes = processor.layout(width, height)
        packed = processor(noise(width, height))
        assert packed["grids"].tolist() == [list(grid)]
        assert packed["slice_shapes"].tolist() == [list(shape) for shape in shapes]
        assert len(packed["pixel_values"]) == sum(rows * columns for rows, columns in shapes)


def test_long_side_resizes_first():
    processor = LlavaUHDImageProcessor(long_side=1024)
    assert processor.layout(200, 200)[0] == (2, 3)  # 1024x1024 is cut in 3 columns and 2 rows


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'anyres'"):
        LlavaUHDImageProcessor(image_mode="anyres")
