"""`seedloom show URI --trajectory TARGET`: by what genie_ada chose the noise ratio of each candidate.

A row for each candidate: its source, its image, and d_m over the ratios (`stages.generate.genie_ada`), from
the lowest to the highest of all rows. The chosen ratio is the one after the largest jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.show.page import CAPTION, CELL, FAINT, GAP, GREEN, INK, MARGIN, PAPER, square
from schemas.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

CURVE = 320  # pixels, the width of a curve
BESIDE = 44  # pixels left of it, for its scale


@dataclass(frozen=True)
class Chosen:
    """A candidate, and the numbers by which its ratio was chosen."""

    key: str
    source_class: str
    source: Image
    image: Image
    ratios: tuple[float, ...]
    distances: tuple[float, ...]  # d_m of each ratio
    ratio: float  # r*


def gather(store: Any, plan: Any, target: str, count: int) -> list[Chosen]:
    """The first candidates of a target whose ratio was chosen, accepted or not. Raises `UserError`."""
    from pipeline.config import method_of
    from pipeline.parts import part_name, read_table
    from pipeline.references import fetch
    from stages.generate.genie_ada import GenieAda
    from stages.images import decode

    methods = {s.id: method_of("generate", plan.config.recipes[s.recipe].generate) for s in plan.streams}
    choosing = [s for s in plan.streams if isinstance(methods[s.id], GenieAda)]
    streams = [s for s in choosing if s.target == target]
    if not streams:
        known = ", ".join(sorted({s.target for s in choosing})) or "none"
        raise UserError(
            f"--trajectory {target!r}: no recipe of this target chooses ratios (genie_ada does);"
            f" targets of which one does: {known}"
        )
    found: list[Chosen] = []
    for stream in streams:
        for unit in range(stream.max_units):
            if len(found) >= count or not store.exists(part_name(stream, unit)):
                break
            found += [
                Chosen(
                    row["key"],
                    row["source_class"],
                    square(decode(fetch(store, row["source"]))),
                    decode(row["image"]),
                    tuple(methods[stream.id].ratios()),
                    tuple(row["generate_trace"]),
                    row["noise_ratio"],
                )
                for row in read_table(store, part_name(stream, unit)).to_pylist()
                if row["status"] == "ok"
            ]
    if not found:
        raise UserError(f"--trajectory {target!r}: every candidate of this target failed; nothing was chosen")
    return found[:count]


def draw(rows: Sequence[Chosen]) -> Image:
    """The picture of these candidates."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    block = CAPTION + GAP + CELL + CAPTION + MARGIN
    page = Image.new(
        "RGB", (2 * MARGIN + 2 * (CELL + GAP) + BESIDE + CURVE, MARGIN + block * len(rows)), PAPER
    )
    pen = ImageDraw.Draw(page)
    every = [d for row in rows for d in row.distances]
    low, high = min(every), max(every)
    for place, row in enumerate(rows):
        x, y = MARGIN, MARGIN + place * block
        pen.text((x, y), f"{row.key}  ·  from {row.source_class}  ·  r* = {row.ratio:g}", INK, font)
        y += CAPTION + GAP
        for picture in (row.source, row.image):
            page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
            x += CELL + GAP
        _curve(pen, (x + BESIDE, y), row, (low, high), font)
    return page


def _curve(
    pen: ImageDraw, corner: tuple[int, int], row: Chosen, scale: tuple[float, float], font: Any
) -> None:
    left, top = corner
    low, high = scale
    first, last = row.ratios[0], row.ratios[-1]

    def height(d: float) -> int:
        return top + round((CELL - 1) * (high - d) / ((high - low) or 1))

    dots = [
        (left + round((CURVE - 2 * MARGIN) * (r - first) / (last - first)), height(d))
        for r, d in zip(row.ratios, row.distances, strict=True)
    ]
    for value in (low, high):
        pen.line((left, height(value), left + CURVE - 2 * MARGIN, height(value)), FAINT)
        pen.text((left - 8, height(value)), f"{value:.2f}", FAINT, font, anchor="rm")
    pen.line(dots, INK, width=2)
    for (x, y), ratio in zip(dots, row.ratios, strict=True):
        chosen = ratio == row.ratio
        size, colour = (5, GREEN) if chosen else (2, INK)
        pen.ellipse((x - size, y - size, x + size, y + size), colour)
        pen.text((x, top + CELL + 2), f"{ratio:g}", colour if chosen else FAINT, font, anchor="ma")
