"""What the pictures of a build have in common: sizes, colours, and images as squares."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, GAP, CAPTION, MARGIN = 72, 4, 18, 16  # pixels
INK, PAPER, FAINT, RED, GREEN = "#1d1f21", "#ffffff", "#8a8f94", "#c0392b", "#2e8b57"


def square(image: Image) -> Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
