"""Make image tasks without any download: scikit-learn's digits (real) and generated families.

A generated image has random colours, position, size, angle and pixel noise, so that no task is trivial and each task
needs different features. Images are square, RGB, drawn at four times their size and reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_ZOOM = 4
LETTERS = "ABCDEFGHKL"
SHAPES = ("disc", "square", "triangle", "cross", "ring", "frame", "half disc", "diamond")

Draw = Callable[[int, int, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class GeneratedTask:
    """A family of generated images.

    Attributes:
        num_classes: K.
        draw: (class, edge in pixels, random numbers) -> one image without noise.
        noise: standard deviation of the pixel noise, of 255.
    """

    num_classes: int
    draw: Draw
    noise: float = 20.0

    def sample(self, count: int, edge: int, seed: int) -> tuple[list[Image.Image], list[int]]:
        """Draw `count` images of random classes, and return images and classes."""
        rng = np.random.default_rng(seed)
        labels = [int(label) for label in rng.integers(self.num_classes, size=count)]
        return [noisy(self.draw(label, edge, rng), self.noise, rng) for label in labels], labels


def noisy(image: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian pixel noise, clipped to 0..255."""
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + rng.normal(0, deviation, pixels.shape), 0, 255).astype(np.uint8))


def digits(edge: int, seed: int) -> tuple[list[Image.Image], list[int]]:
    """Load scikit-learn's 1,797 handwritten digits, shuffled, light on dark grey levels (extra `demo`)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    gray = np.round(data.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(gray))
    images = [Image.fromarray(gray[i]).resize((edge, edge), Image.Resampling.BICUBIC).convert("RGB") for i in order]
    return images, [int(data.target[i]) for i in order]


def _canvas(edge: int, rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, ...]]:
    """Make a large image in a random dark colour, a pen for it, and a random bright colour."""
    back, front = rng.integers(0, 100, 3), rng.integers(120, 256, 3)
    image = Image.new("RGB", (edge * _ZOOM, edge * _ZOOM), tuple(int(c) for c in back))
    return image, ImageDraw.Draw(image), tuple(int(c) for c in front)


def _reduced(image: Image.Image) -> Image.Image:
    return image.resize((image.width // _ZOOM, image.height // _ZOOM), Image.Resampling.BOX)


def _polygon(x: float, y: float, radius: float, angle: float, corners: int) -> list[tuple[float, float]]:
    steps = [angle + 2 * math.pi * i / corners for i in range(corners)]
    return [(x + radius * math.cos(step), y + radius * math.sin(step)) for step in steps]


def shape(kind: int, edge: int, rng: np.random.Generator) -> Image.Image:
    """Draw a shape of SHAPES at a random position and size and a small random angle."""
    image, pen, colour = _canvas(edge, rng)
    size = edge * _ZOOM
    radius = size * rng.uniform(0.3, 0.42)
    x, y = size / 2 + rng.uniform(-0.1, 0.1, 2) * size
    tilt = rng.uniform(-0.25, 0.25)
    box, width = (x - radius, y - radius, x + radius, y + radius), max(1, int(radius * 0.35))
    name = SHAPES[kind]
    if name == "disc":
        pen.ellipse(box, fill=colour)
    elif name == "ring":
        pen.ellipse(box, outline=colour, width=width)
    elif name == "half disc":
        start = math.degrees(tilt) + 90 * int(rng.integers(4))
        pen.pieslice(box, start, start + 180, fill=colour)
    elif name == "cross":
        for turn in (0.0, math.pi / 2):
            ends = _polygon(x, y, radius, tilt + turn, 2)
            pen.line(ends, fill=colour, width=width)
    else:
        corners, turn = {"triangle": (3, math.pi / 2), "diamond": (4, 0.0)}.get(name, (4, math.pi / 4))
        points = _polygon(x, y, radius, tilt - turn, corners)
        if name == "frame":
            pen.line([*points, *points[:2]], fill=colour, width=width, joint="curve")
        else:
            pen.polygon(points, fill=colour)
    return _reduced(image)


def stripes(kind: int, edge: int, rng: np.random.Generator) -> Image.Image:
    """Draw a grating of random period, phase and colours; the class is its direction, in eighths of a half turn."""
    angle = math.pi * (kind + rng.uniform(-0.3, 0.3)) / 8
    period, phase = edge * rng.uniform(0.25, 0.5), rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[:edge, :edge]
    wave = np.sin(2 * math.pi * (xs * math.cos(angle) + ys * math.sin(angle)) / period + phase)
    back, front = rng.integers(256, size=(2, 3))
    front = np.where(np.arange(3) == rng.integers(3), (back + 128) % 256, front)
    mixed = back + (front - back) * (0.5 + 0.5 * wave[..., None])
    return Image.fromarray(mixed.astype(np.uint8))


def letter(kind: int, edge: int, rng: np.random.Generator) -> Image.Image:
    """Draw a letter of LETTERS, rotated by up to 20 degrees."""
    image, _, colour = _canvas(edge, rng)
    size = edge * _ZOOM
    glyph = Image.new("L", image.size, 0)
    font = ImageFont.load_default(size * rng.uniform(0.65, 0.95))
    place = tuple(size / 2 + rng.uniform(-0.1, 0.1, 2) * size)
    ImageDraw.Draw(glyph).text(place, LETTERS[kind], fill=255, font=font, anchor="mm")
    glyph = glyph.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR)
    image.paste(Image.new("RGB", image.size, colour), mask=glyph)
    return _reduced(image)


GENERATED: Mapping[str, GeneratedTask] = {
    "shapes": GeneratedTask(len(SHAPES), shape),
    "stripes": GeneratedTask(8, stripes, noise=35.0),
    "letters": GeneratedTask(len(LETTERS), letter),
}
