"""Pixels: an RGB image -> overview and slices -> packed uint8 patches.

`LlavaUHDImageProcessor` resizes and cuts as `slicing.py` plans. Resizing is PIL's bicubic on 8-bit RGB, as in the
published code.
"""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top-level name wants torchvision

from llava.images import to_rgb
from llava.model.configuration_llava_uhd import LlavaUHDConfig
from llava.model.slicing import long_side_size, plan_slices

IMAGE_MODES = ("uhd", "overview", "square")
SLICE_LAYOUTS = ("stitched", "per_slice")


def check_mode(image_mode: str) -> str:
    if image_mode not in IMAGE_MODES:
        raise ValueError(f"image_mode is {image_mode!r}; choose one of {', '.join(IMAGE_MODES)}")
    return image_mode


def patchify(
    image: Image.Image, patch: int, grid: tuple[int, int] = (1, 1), out: np.ndarray | None = None
) -> np.ndarray:
    """A picture of `grid` (rows, columns) slices as patches: (patches, 3*patch*patch) uint8, in `out` if given.

    Slices in row-major order, patches in row-major order within a slice, channel-major within a patch.
    """
    pixels = np.asarray(image)  # (height, width, 3)
    rows, columns = pixels.shape[0] // grid[0] // patch, pixels.shape[1] // grid[1] // patch
    cells = pixels.reshape(grid[0], rows, patch, grid[1], columns, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    if out is None:
        out = np.empty((grid[0] * grid[1] * rows * columns, 3 * patch * patch), dtype=np.uint8)
    out.reshape(cells.shape)[...] = cells
    return out


class LlavaUHDImageProcessor(BaseImageProcessor):
    """Cuts images into slices and packs them as patches.

    Args:
        image_mode: `uhd` (slices and overview), `overview` (stage 1), `square` (resize and centre-crop to
            `resolution`, the low-resolution model).
        resolution, patch_size, max_slices: see `slicing.py`; the toy model uses smaller ones.
        long_side: when set, every image is first resized so that its longer side has this length (1024 in the
            published generation code). Off by default: the same pixels in training and generation.
        slice_layout: order of the slices' features, see `processing_llava_uhd.py`. `per_slice` features are those of
            a grid of one column, so the model needs no switch.
    """

    model_input_names = ["pixel_values", "slice_shapes", "grids"]

    def __init__(
        self,
        image_mode: str = "uhd",
        resolution: int = 336,
        patch_size: int = 14,
        max_slices: int = 7,
        long_side: int | None = None,
        slice_layout: str = "stitched",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if slice_layout not in SLICE_LAYOUTS:
            raise ValueError(f"slice_layout is {slice_layout!r}; choose one of {', '.join(SLICE_LAYOUTS)}")
        self.image_mode, self.long_side, self.slice_layout = check_mode(image_mode), long_side, slice_layout
        self.resolution, self.patch_size, self.max_slices = resolution, patch_size, max_slices

    def layout(
        self, width: int, height: int, image_mode: str | None = None
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Grid (rows, columns) of slices, (0, 0) without, and each slice's (rows, columns) of patches, overview last.

        A function of the image's size alone: token counts are known before any pixel is read.
        """
        mode = check_mode(image_mode or self.image_mode)
        side = self.resolution // self.patch_size
        if mode == "square":
            return (0, 0), [(side, side)]
        plan = self.plan(width, height)
        overview = (plan.overview_size[1] // self.patch_size, plan.overview_size[0] // self.patch_size)
        if mode == "overview" or plan.grid is None:
            return (0, 0), [overview]
        cell = (plan.slice_size[1] // self.patch_size, plan.slice_size[0] // self.patch_size)
        return (plan.grid[1], plan.grid[0]), [cell] * plan.slices + [overview]

    def plan(self, width: int, height: int):
        if self.long_side:
            width, height = long_side_size(width, height, self.long_side)
        return plan_slices(width, height, self.resolution, self.patch_size, self.max_slices)

    def views(self, image: Image.Image, image_mode: str | None = None) -> list[tuple[Image.Image, tuple[int, int]]]:
        """What the tower sees of an RGB image: the picture that holds all slices with its grid, then the overview."""
        mode = check_mode(image_mode or self.image_mode)
        if mode == "square":
            return [(self.square(image), (1, 1))]
        if self.long_side:
            image = image.resize(long_side_size(*image.size, self.long_side), Image.Resampling.BICUBIC)
        plan = plan_slices(*image.size, self.resolution, self.patch_size, self.max_slices)
        overview = (image.resize(plan.overview_size, Image.Resampling.BICUBIC), (1, 1))
        if mode == "overview" or plan.grid is None:
            return [overview]
        (columns, rows), (width, height) = plan.grid, plan.slice_size
        whole = image.resize((columns * width, rows * height), Image.Resampling.BICUBIC)
        return [(whole, (rows, columns)), overview]

    def cut(self, image: Image.Image, image_mode: str | None = None) -> list[Image.Image]:
        """The slices in row-major order, then the overview, as pictures to look at."""
        pieces = []
        for picture, (rows, columns) in self.views(image, image_mode):
            width, height = picture.width // columns, picture.height // rows
            pieces += [
                picture.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
                for y in range(rows)
                for x in range(columns)
            ]
        return pieces

    def square(self, image: Image.Image) -> Image.Image:
        """CLIP's default: shorter side to `resolution`, centre crop."""
        short = min(image.size)
        size = tuple(int(self.resolution * side / short) for side in image.size)  # rounded as HF's CLIPImageProcessor
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.resolution) // 2, (size[1] - self.resolution) // 2
        return image.crop((left, top, left + self.resolution, top + self.resolution))

    def preprocess(
        self,
        images: Image.Image | list[Image.Image],
        image_mode: str | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Pack a list of PIL images.

        Returns:
            pixel_values (P, 3*patch*patch) uint8; slice_shapes (N, 2) and grids (I, 2) int64, rows then columns.

        Raises:
            ValueError: an unknown `image_mode`.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        images = [to_rgb(image) for image in images]
        layouts = [self.layout(*image.size, image_mode) for image in images]
        shapes = [shape for _, slice_shapes in layouts for shape in slice_shapes]
        patches = np.empty((sum(h * w for h, w in shapes), 3 * self.patch_size**2), dtype=np.uint8)
        start, grids = 0, []
        for image, (grid, _) in zip(images, layouts, strict=True):
            for picture, cells in self.views(image, image_mode):
                stop = start + picture.width * picture.height // self.patch_size**2
                patchify(picture, self.patch_size, cells, out=patches[start:stop])
                start = stop
            grids.append((grid[0] * grid[1], 1) if grid[0] and self.slice_layout == "per_slice" else grid)
        return BatchFeature(
            {
                "pixel_values": torch.from_numpy(patches),
                "slice_shapes": torch.tensor(shapes),
                "grids": torch.tensor(grids),
            }
        )

    __call__ = preprocess


AutoImageProcessor.register(LlavaUHDConfig, LlavaUHDImageProcessor)
