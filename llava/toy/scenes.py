"""Scenes of the toy world: what is in them, and how they are drawn.

A scene holds one to three objects (shape, colour, size, texture, place) and sometimes a printed letter or digit on a
plain background. Everything is a function of a seed. Image sizes are chosen so that, at the toy model's resolution of
48 pixels, every slice count from 0 to 7 occurs.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 190),
    "orange": (250, 140, 30),
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
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")


@dataclass(frozen=True)
class Thing:
    """One object. `cell` is (row, column) of the 3x3 places."""

    shape: str
    color: str
    size: str
    texture: str
    cell: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return place_name(self.cell)


@dataclass(frozen=True)
class Scene:
    """What one image shows; the ground truth of every caption and question."""

    seed: int
    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    printed: str | None
    printed_cell: tuple[int, int] | None


def place_name(cell: tuple[int, int]) -> str:
    words = [word for word in (ROWS[cell[0]], COLUMNS[cell[1]]) if word]
    return " ".join(words) or "center"


def sample_scene(seed: int) -> Scene:
    """The scene of this seed. Objects of one scene differ in shape or colour and stand in different places."""
    rng = random.Random(f"scene/{seed}")
    width, height = rng.choices(list(IMAGE_SIZES), weights=list(IMAGE_SIZES.values()))[0]
    rows = (1,) if width >= 2 * height else (0, 1, 2)
    columns = (1,) if height >= 2 * width else (0, 1, 2)
    cells = [(row, column) for row in rows for column in columns]
    rng.shuffle(cells)
    count = rng.choice((1, 2, 2, 3)) if len(cells) > 3 else rng.choice((1, 2))
    names = [(shape, color) for shape in SHAPES for color in COLORS]
    things = tuple(
        Thing(shape, color, rng.choice(SIZES), rng.choice(("plain", "plain", "striped")), cells.pop())
        for shape, color in rng.sample(names, count)
    )
    printed = rng.choice(LETTERS + DIGITS) if rng.random() < 0.4 else None
    return Scene(
        seed=seed,
        width=width,
        height=height,
        background=rng.choice(list(BACKGROUNDS)),
        things=tuple(sorted(things, key=lambda thing: thing.cell)),
        printed=printed,
        printed_cell=cells.pop() if printed else None,
    )


def render(scene: Scene) -> Image.Image:
    """Draw the scene. Large objects may reach into a neighbour's place, so a few overlap."""
    rng = random.Random(f"render/{scene.seed}")
    image = Image.new("RGB", (scene.width, scene.height), BACKGROUNDS[scene.background])
    for thing in scene.things:
        center, cell = cell_box(scene, thing.cell)
        side = int(cell * (1.3 if thing.size == "large" else 0.8))
        jitter = max(cell // 10, 1)
        x = center[0] - side // 2 + rng.randint(-jitter, jitter)
        y = center[1] - side // 2 + rng.randint(-jitter, jitter)
        x, y = min(max(x, 0), scene.width - side), min(max(y, 0), scene.height - side)
        image.paste(surface(thing, side), (x, y), silhouette(thing.shape, side))
    if scene.printed:
        center, cell = cell_box(scene, scene.printed_cell)
        ink = (250, 250, 250) if scene.background != "white" else (10, 10, 10)
        font = ImageFont.load_default(size=max(int(cell * 0.95), 12))
        ImageDraw.Draw(image).text(center, scene.printed, fill=ink, font=font, anchor="mm")
    return image


def cell_box(scene: Scene, cell: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Center of a place in pixels, and the side of the square that fits it."""
    width = scene.width // 3
    height = scene.height // 3
    side = min(scene.height if scene.width >= 2 * scene.height else height, width)
    return (int((cell[1] + 0.5) * width), int((cell[0] + 0.5) * height)), side


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
    elif shape == "ring":
        draw.ellipse((0, 0, edge, edge), fill=255)
        draw.ellipse((third * 0.8, third * 0.8, edge - third * 0.8, edge - third * 0.8), fill=0)
    elif shape == "square":
        draw.rectangle((big // 12, big // 12, edge - big // 12, edge - big // 12), fill=255)
    elif shape == "triangle":
        draw.polygon([(big // 2, 0), (edge, edge), (0, edge)], fill=255)
    else:
        draw.rectangle((third, 0, edge - third, edge), fill=255)
        draw.rectangle((0, third, edge, edge - third), fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)
