"""Image files -> pixels: the one place where a file becomes an image. Pillow and NumPy only.

EXIF orientation is applied, transparency composed over white, 16-bit scaled to 8; what cannot be decoded is rejected
with the file's name and never replaced.
"""

import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from llava.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class ImageError(UserError):
    """An image that cannot be read; the message names the file and what is wrong with it."""


def find_image(folder: str | Path, name: str) -> Path:
    """The path of a record's image below `folder`. Raises ImageError for names that leave it or are no regular file."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise ImageError(
            f"image {name!r} must be a path below the image folder {folder}, without '..' or a leading '/'"
        )
    path = Path(folder) / relative
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"image {str(path)!r} cannot be opened: {reason}") from error
    if not stat.S_ISREG(kind):
        raise ImageError(f"image {path} is not a regular file")
    return path


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) as shown, EXIF orientation applied, read from the header alone."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (
                5,
                6,
                7,
                8,
            )  # Pillow turns TIFFs itself
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def load_image(path: str | Path | BinaryIO) -> Image.Image:
    """Decode one image file (or its bytes as an open file) to upright 8-bit RGB."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return to_rgb(image)
    except ImageError as error:
        raise ImageError(f"image {path}: {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: transparency over white, 16-bit integers scaled down to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ImageError(f"pixels of mode {image.mode} have no fixed range; save the image as 8-bit")
        scaled = (values >> 8) if values.max() > 255 or image.mode.startswith("I;16") else values
        image = Image.fromarray(scaled.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
