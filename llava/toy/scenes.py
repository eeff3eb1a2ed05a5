"""Scenes of the toy world: what is in them, and how they are drawn.

A scene holds one to three objects (shape, colour, size, texture, place) and sometimes a printed letter or digit on a
plain background. Everything is a function of a seed. Image sizes are chosen so that, at the toy model's resolution of
48 pixels, every slice count from 0 to 7 occurs.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 190),
}
BACKGROUNDS = {"black": (15, 15, 15), "gray": (125, 125, 125), "white": (240, 240, 240)}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped")
LETTERS = "AEHKTX"
DIGITS = "123470"
# (width, height) -> slices at 48 px: 0, 0, 2, 2, 3, 4, 4, 6, 6, 6, 5, 7 at most
IMAGE_SIZES = {
    (48, 48): 8, (56, 40): 5, (72, 48): 6, (48, 72): 5, (150, 50): 2, (90, 90): 3, (100, 84): 3, (128, 90): 1,
    (90, 128): 1, (144, 112): 1, (240, 48): 1, (336, 48): 1,
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")
STRIP = ("left", "center", "right")  # places of an image at least twice as wide as high


@dataclass(frozen=True)
class Thing:
    """One object and its place."""

    shape: str
    color: str
    size: str
    texture: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What one image shows; the ground truth of every caption and question."""

    seed: int
    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    printed: str | None
    printed_place: str | None


def sample_scene(seed: int) -> Scene:
    """The scene of this seed. Objects of one scene differ in shape or colour and stand in different places."""
    rng = random.Random(f"scene/{seed}")
    width, height = rng.choices(list(IMAGE_SIZES), weights=list(IMAGE_SIZES.values()))[0]
    places = list(STRIP if width >= 2 * height else CORNERS)
    order = {place: number for number, place in enumerate(places)}
    rng.shuffle(places)
    count = rng.choice((1, 2, 2, 3)) if len(places) > 3 else rng.choice((1, 2))
    names = [(shape, color) for shape in SHAPES for color in COLORS]
    things = tuple(
        Thing(shape, color, rng.choice(SIZES), rng.choice(("plain", "plain", "striped")), places.pop())
        for shape, color in rng.sample(names, count)
    )
    printed = rng.choice(LETTERS + DIGITS) if rng.random() < 0.4 else None
    return Scene(
        seed=seed,
        width=width,
        height=height,
        background=rng.choice(list(BACKGROUNDS)),
        things=tuple(sorted(things, key=lambda thing: order[thing.place])),
        printed=printed,
        printed_place=places.pop() if printed else None,
    )


def render(scene: Scene) -> Image.Image:
    """Draw the scene. Large objects may reach into a neighbour's place, so a few overlap."""
    image = Image.new("RGB", (scene.width, scene.height), BACKGROUNDS[scene.background])
    for thing, (x, y, side) in zip(scene.things, squares(scene), strict=True):
        image.paste(surface(thing, side), (x, y), silhouette(thing.shape, side))
    if scene.printed:
        center, cell = place_box(scene, scene.printed_place)
        ink = (250, 250, 250) if scene.background != "white" else (10, 10, 10)
        font = ImageFont.load_default(size=int(cell * 0.9))
        ImageDraw.Draw(image).text(center, scene.printed, fill=ink, font=font, anchor="mm")
    return image


def squares(scene: Scene) -> list[tuple[int, int, int]]:
    """(left, top, side) in pixels of the square that each object fills."""
    rng, found = random.Random(f"render/{scene.seed}"), []
    for thing in scene.things:
        center, cell = place_box(scene, thing.place)
        side = int(cell * (1.05 if thing.size == "large" else 0.6))
        jitter = max(cell // 10, 1)
        x = center[0] - side // 2 + rng.randint(-jitter, jitter)
        y = center[1] - side // 2 + rng.randint(-jitter, jitter)
        found.append((min(max(x, 0), scene.width - side), min(max(y, 0), scene.height - side), side))
    return found


def outlines(scene: Scene) -> list[Image.Image]:
    """What is visible of every object, and the square of the printed character if there is one, as masks."""
    masks: list[Image.Image] = []
    for thing, (x, y, side) in zip(scene.things, squares(scene), strict=True):
        outline = silhouette(thing.shape, side)
        for hidden in masks:
            hidden.paste(0, (x, y), outline)
        masks.append(Image.new("L", (scene.width, scene.height)))
        masks[-1].paste(255, (x, y), outline)
    if scene.printed:
        (x, y), cell = place_box(scene, scene.printed_place)
        masks.append(Image.new("L", (scene.width, scene.height)))
        half = int(cell * 0.35)
        ImageDraw.Draw(masks[-1]).rectangle((x - half, y - half, x + half, y + half), fill=255)
    return masks


def place_box(scene: Scene, place: str) -> tuple[tuple[int, int], int]:
    """Center of a place in pixels, and the side of the square that fits it."""
    if place in STRIP:
        width = scene.width // 3
        return (int((STRIP.index(place) + 0.5) * width), scene.height // 2), min(width, scene.height)
    row, column = divmod(CORNERS.index(place), 2)
    width, height = scene.width // 2, scene.height // 2
    return (int((column + 0.5) * width), int((row + 0.5) * height)), min(width, height)


def surface(thing: Thing, side: int) -> Image.Image:
    """The object's colour, with dark diagonal stripes when striped."""
    color = COLORS[thing.color]
    tile = Image.new("RGB", (side, side), color)
    if thing.texture == "striped":
        draw = ImageDraw.Draw(tile)
        dark = tuple(channel // 4 for channel in color)
        step = max(side // 3, 5)
        for start in range(-side, side, step):
            draw.line((start, side, start + side, 0), fill=dark, width=max(step // 2, 2))
    return tile


def silhouette(shape: str, side: int) -> Image.Image:
    """The object's outline as a mask, drawn at four times the size and reduced."""
    big = side * 4
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    edge, third = big - 1, big // 3
    if shape == "circle":
        draw.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "square":
        draw.rectangle((big // 12, big // 12, edge - big // 12, edge - big // 12), fill=255)
    elif shape == "triangle":
        draw.polygon([(big // 2, 0), (edge, edge), (0, edge)], fill=255)
    else:
        draw.rectangle((third, 0, edge - third, edge), fill=255)
        draw.rectangle((0, third, edge, edge - third), fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)
