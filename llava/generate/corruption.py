"""Image corruptions that make answers worse: the rejected side of preference data (paper, DPO variants).

The four published ones, in Pillow and NumPy, each a function of an image and a seeded generator; besides them any
augmenter of imgaug by its name (`imgaug:GaussianBlur(sigma=(3, 5))`, extra `aug`). One is drawn at random per record and
named in the lineage.
"""

import ast
import math
import random
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from llava.errors import UserError


def gaussian_blur(image: Image.Image, rng: random.Random) -> Image.Image:
    """Blur with sigma uniform in (3, 5) pixels."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(3, 5)))


def color_jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    """Brightness, contrast, saturation by factors in (0.2, 1.8) and hue by up to 0.2 of a turn, in random order."""

    def hue(picture: Image.Image) -> Image.Image:
        h, s, v = picture.convert("HSV").split()
        shift = round(rng.uniform(-0.2, 0.2) * 255)
        return Image.merge("HSV", (h.point(lambda x: (x + shift) % 256), s, v)).convert("RGB")

    steps = [
        lambda picture: ImageEnhance.Brightness(picture).enhance(rng.uniform(0.2, 1.8)),
        lambda picture: ImageEnhance.Contrast(picture).enhance(rng.uniform(0.2, 1.8)),
        lambda picture: ImageEnhance.Color(picture).enhance(rng.uniform(0.2, 1.8)),
        hue,
    ]
    rng.shuffle(steps)
    for step in steps:
        image = step(image)
    return image


def mirror_rotation(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirror left-right, then turn by 90 or 270 degrees; the canvas turns with it."""
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return mirrored.transpose(rng.choice((Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)))


def mask(image: Image.Image, rng: random.Random) -> Image.Image:
    """Replace a half-plane of random direction, 25 to 35 % of the area, by its own mean colour."""
    pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    angle = rng.uniform(0, 2 * math.pi)
    distance = np.arange(width)[None] * math.cos(angle) + np.arange(height)[:, None] * math.sin(angle)
    covered = distance <= np.quantile(distance, rng.uniform(0.25, 0.35))
    pixels[covered] = pixels[covered].mean(axis=0).round().astype(np.uint8)
    return Image.fromarray(pixels)


CORRUPTIONS = {
    "gaussian_blur": gaussian_blur,
    "color_jitter": color_jitter,
    "mirror_rotation": mirror_rotation,
    "mask": mask,
}


def check_corruptions(text: str) -> tuple[str, ...]:
    """The names in a comma-separated text, or UserError for one that is unknown. Commas in brackets belong to a name."""
    names = tuple(re.findall(r"(?:[^,()]|\([^()]*(?:\([^()]*\)[^()]*)*\))+", text))
    for name in names:
        if name.startswith("imgaug:"):
            imgaug_augmenter(name)
        elif name not in CORRUPTIONS:
            raise UserError(f"AUGMENT_METHODS has {name!r}; known are {', '.join(CORRUPTIONS)} and imgaug:NAME")
    return names


def imgaug_augmenters():
    """The module imgaug.augmenters. Raises UserError when imgaug is not installed."""
    import numpy

    # imgaug 0.4.0, its last release, asks for two names that NumPy 2 has dropped
    if not hasattr(numpy, "sctypes"):
        kinds = ("int", "uint", "float", "complex")
        numpy.sctypes = {kind: [numpy.dtype(f"{kind}{bits}").type for bits in widths] for kind, widths in zip(
            kinds, ((8, 16, 32, 64), (8, 16, 32, 64), (16, 32, 64), (64, 128)), strict=True
        )}  # fmt: skip
        numpy.sctypes["others"] = [bool, object, bytes, str, numpy.void]
        numpy.complex = complex
    try:
        from imgaug import augmenters
    except ImportError as error:
        raise UserError(f"imgaug:NAME needs imgaug ({error}). Fix: run `bash training_scripts/setup.sh aug`") from error
    return augmenters


def imgaug_augmenter(name: str):
    """The augmenter of `imgaug:NAME` or `imgaug:NAME(argument, name=argument)`, arguments being Python literals.

    Raises:
        UserError: imgaug is not installed, or has no such augmenter, or not with these arguments.
    """
    augmenters = imgaug_augmenters()
    try:
        call = ast.parse(name.removeprefix("imgaug:"), mode="eval").body
        function, arguments, keywords = (
            (call.func, call.args, call.keywords) if isinstance(call, ast.Call) else (call, [], [])
        )
        kind = getattr(augmenters, function.id)
        return kind(*map(ast.literal_eval, arguments), **{word.arg: ast.literal_eval(word.value) for word in keywords})
    except (SyntaxError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"AUGMENT_METHODS has {name!r}, which imgaug cannot make: {error}") from error


def by_imgaug(name: str, image: Image.Image, rng: random.Random) -> Image.Image:
    augmenter = imgaug_augmenter(name)
    augmenter.seed_(rng.getrandbits(31))  # of itself and its children; imgaug does not look at NumPy's generator
    return Image.fromarray(augmenter(image=np.array(image.convert("RGB"))))


def corrupt(images: list[Image.Image], names: tuple[str, ...], seed: int) -> tuple[str, list[Image.Image]]:
    """Corrupt all images of a record in one way drawn from `names`; returns the way and the images."""
    rng = random.Random(seed)
    name = rng.choice(sorted(names))
    if name.startswith("imgaug:"):
        return name, [by_imgaug(name, image, rng) for image in images]
    return name, [CORRUPTIONS[name](image, rng) for image in images]
