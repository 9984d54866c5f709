"""The pictures that tangram learns from: one flat shape, 64x64, anti-aliased, with a caption.

Every picture is a function of a `numpy.random.Generator` alone. The outlines live in `shapes.py`; here
they get a colour, a texture, a background, a place, a size and an angle.

Shape letters: H W image (64, 64), C colour channels (RGB, 0..1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jobs.tangram.shapes import CLASSES, outline
from stages.backbones.tangram_captions import COLOURS as COLOUR_NAMES
from stages.backbones.tangram_captions import TEXTURES

SIZE = 64
SUPERSAMPLE = 4
RADIUS = (17.0, 26.0)  # pixels from the centre to the farthest corner

COLOURS: dict[str, tuple[float, float, float]] = dict(
    zip(
        COLOUR_NAMES,
        (
            (0.86, 0.12, 0.14),
            (0.98, 0.55, 0.08),
            (0.97, 0.86, 0.16),
            (0.14, 0.62, 0.22),
            (0.06, 0.66, 0.68),
            (0.14, 0.30, 0.86),
            (0.52, 0.18, 0.72),
            (0.97, 0.50, 0.70),
        ),
        strict=True,
    )
)

BACKGROUNDS: tuple[str, ...] = ("plain", "gradient", "glowing", "wavy", "tiled", "banded")

# Training counts of VAE and UNet: from 3000 pictures of the commonest class down to 10 of the rarest, each
# class 22 % rarer than the one before it (the "exponential long tail" of CIFAR-LT).
COUNTS: dict[str, int] = {
    name: round(3000 * (10 / 3000) ** (rank / (len(CLASSES) - 1))) for rank, name in enumerate(CLASSES)
}
HEAD, MIDDLE, RARE = CLASSES[:8], CLASSES[8:16], CLASSES[16:]

# Data sets never share a picture, because each draws from generators that carry its own name.
SPLITS = ("train", "held_out", "foundation", "classifier", "judge", "references")

_CONTRAST = 0.22  # least difference in luminance between a shape and its background
_LUMA = np.array([0.299, 0.587, 0.114])
_Y_HW, _X_HW = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64) + 0.5


@dataclass(frozen=True)
class Attributes:
    """What a drawing shows. Lengths in pixels, angles in radians."""

    shape: str
    colour: str
    texture: str
    background: str
    background_colour: str
    centre: tuple[float, float]
    radius: float
    angle: float

    @property
    def noun(self) -> str:
        """The class as a caption says it."""
        return self.shape.replace("_", " ")


def generator(split: str, shape: str, index: int, rng_seed: int = 0) -> np.random.Generator:
    """The generator of picture `index` of a class in a split. The four are hashed together, never added."""
    digest = hashlib.sha256(f"{split}/{rng_seed}/{shape}/{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw(shape: str, rng: np.random.Generator, size: int = SIZE) -> tuple[Image.Image, Attributes]:
    """Draw one picture of `shape`: RGB, size x size. Everything but the shape is free."""
    if shape not in CLASSES:
        raise ValueError(f"tangram has no class {shape!r}: choose one of {', '.join(CLASSES)}")
    colour, background_colour, ground_C = _colours(rng)
    texture = str(rng.choice(TEXTURES))
    background = str(rng.choice(BACKGROUNDS))
    radius = float(rng.uniform(*RADIUS))
    room = SIZE / 2 - radius - 1.0
    cx, cy = (float(SIZE / 2 + rng.uniform(-room, room)) for _ in range(2))
    angle = float(rng.uniform(0.0, 2 * np.pi))
    attributes = Attributes(shape, colour, texture, background, background_colour, (cx, cy), radius, angle)

    paint_C = np.array(COLOURS[colour])
    # The second tone of a texture moves away from the background, so that the outline never dissolves.
    lighter = paint_C @ _LUMA > ground_C @ _LUMA
    second_C = paint_C * 0.45 + 0.55 if lighter else paint_C * 0.45
    weight_HW = _texture(texture, cx, cy, angle, rng)
    fill_HWC = paint_C + weight_HW[..., None] * (second_C - paint_C)
    ground_HWC = _background(background, ground_C, rng)
    mask_HW = _mask(outline(shape, rng), (cx, cy), radius, angle)[..., None]
    pixels = ground_HWC + mask_HW * (fill_HWC - ground_HWC)
    image = Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return (image if size == SIZE else image.resize((size, size), Image.Resampling.LANCZOS)), attributes


def caption(attributes: Attributes, rng: np.random.Generator) -> str:
    """One of several wordings; three in ten are exactly the default prompt "a photo of a {class}".

    The article is always "a" ("a photo of a arrow"), as a prompt template with {class} has it.
    """
    a, noun = attributes, attributes.noun
    ground = f"{a.background_colour} {a.background} background"
    wordings = (
        (0.30, f"a photo of a {noun}"),
        (0.14, f"a photo of a {a.colour} {noun}"),
        (0.10, f"a photo of a {a.texture} {noun}"),
        (0.10, f"a photo of a {a.texture} {a.colour} {noun}"),
        (0.08, f"a photo of a {noun} on a {ground}"),
        (0.10, f"a {a.texture} {a.colour} {noun} on a {ground}"),
        (0.06, f"a drawing of a {a.colour} {noun} on a {a.background} background"),
        (0.06, f"a {a.colour} {noun}"),
        (0.06, noun),
    )
    return wordings[rng.choice(len(wordings), p=[share for share, _ in wordings])][1]


def write_references(folder: Path, classes: Iterable[str], per_class: int, rng_seed: int = 0) -> list[Path]:
    """Write an ImageFolder of PNG drawings (folder/class/0000.png), held out from all training."""
    return write_drawings(folder, dict.fromkeys(classes, per_class), "references", rng_seed)


def write_drawings(folder: Path, counts: Mapping[str, int], split: str, rng_seed: int = 0) -> list[Path]:
    """Write counts[shape] drawings of each shape of a split as an ImageFolder (folder/class/0000.png)."""
    paths = []
    for shape, count in counts.items():
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, _ = draw(shape, generator(split, shape, index, rng_seed))
            paths.append(folder / shape / f"{index:04d}.png")
            image.save(paths[-1])
    return paths


def _colours(rng: np.random.Generator) -> tuple[str, str, np.ndarray]:
    """Shape colour, background colour, and the background's RGB: a pale or deep tone that contrasts."""
    colour = str(rng.choice(list(COLOURS)))
    luma = np.array(COLOURS[colour]) @ _LUMA
    tones = [
        (name, tone_C)
        for name, rgb in COLOURS.items()
        if name != colour
        for tone_C in (0.35 * np.array(rgb) + 0.62, 0.32 * np.array(rgb) + 0.02)
        if abs(tone_C @ _LUMA - luma) >= _CONTRAST
    ]
    name, tone_C = tones[rng.integers(len(tones))]
    return colour, name, tone_C


def _mask(rings: list[np.ndarray], centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """Coverage (H, W) in 0..1 of closed outlines in the unit circle; the second ring is a hole."""
    canvas = Image.new("L", (SIZE * SUPERSAMPLE,) * 2, 0)
    pen = ImageDraw.Draw(canvas)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for ring, value in zip(rings, (255, 0), strict=False):
        corners = (ring @ turn * radius + centre) * SUPERSAMPLE - 0.5
        pen.polygon([(x, y) for x, y in corners.tolist()], fill=value)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float64) / 255


def _texture(name: str, cx: float, cy: float, angle: float, rng: np.random.Generator) -> np.ndarray:
    """Weight (H, W) in 0..1 of the texture's second tone, in the shape's own frame."""
    period, phase = rng.uniform(9.0, 12.0), rng.uniform(0, 2 * np.pi)
    u = (np.cos(angle) * (_X_HW - cx) + np.sin(angle) * (_Y_HW - cy)) * 2 * np.pi / period
    v = (np.cos(angle) * (_Y_HW - cy) - np.sin(angle) * (_X_HW - cx)) * 2 * np.pi / period
    if name == "plain":
        return np.zeros((SIZE, SIZE))
    if name == "striped":
        return _edge(np.sin(u + phase), 1.4)
    if name == "dotted":
        return _edge(np.cos(u + phase) + np.cos(v + phase) - 0.55, 1.4)
    return _edge(np.sin(u * 0.8 + phase) * np.sin(v * 0.8 + phase), 2.0)


def _background(name: str, tone_C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Background (H, W, C): smooth variations of one tone, weak enough never to look like a shape."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    across = (np.cos(angle) * (_X_HW - 32) + np.sin(angle) * (_Y_HW - 32)) / 32
    along = (np.cos(angle) * (_Y_HW - 32) - np.sin(angle) * (_X_HW - 32)) / 32
    if name == "plain":
        light = np.zeros((SIZE, SIZE))
    elif name == "gradient":
        light = across
    elif name == "glowing":
        gx, gy = rng.uniform(16, 48, 2)
        light = 1.0 - np.hypot(_X_HW - gx, _Y_HW - gy) / 24
    elif name == "wavy":
        light = 0.7 * np.sin(8 * across + 0.9 * np.sin(5 * along + phase))
    elif name == "tiled":
        light = 0.7 * (2 * _edge(np.sin(8 * across + phase) * np.sin(8 * along + phase), 2.0) - 1)
    else:
        light = 0.7 * (2 * _edge(np.sin(8 * across + phase), 1.4) - 1)
    return tone_C + 0.09 * light.clip(-1.2, 1.2)[..., None]


def _edge(wave_HW: np.ndarray, steepness: float) -> np.ndarray:
    """A wave made a pattern: 0 where it is negative, 1 where positive, about two pixels in between."""
    return (0.5 + steepness * wave_HW).clip(0, 1)
