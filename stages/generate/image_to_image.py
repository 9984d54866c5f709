"""Image-to-image: the class's own references, noised and drawn again with its prompt.

SDEdit (Meng et al., arXiv:2108.01073) in the latent space, see `stages.generate.redraw`. GeNIe's baselines
Img2Img are r = 0.3 (low: little changes) and r = 0.7 (high).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from stages import registry
from stages.generate.redraw import FixedRedraw, RedrawSettings

PRESETS = {"low": 0.3, "high": 0.7}


@registry.method("image_to_image")
class ImageToImage(FixedRedraw):
    """References of the class, changed as far as the noise ratio allows."""

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "reference"

    class Config(RedrawSettings):
        method: Literal["image_to_image"] = "image_to_image"
        ratio: float = Field(PRESETS["high"], gt=0, le=1)
        """Noise ratio r, the share of the steps that are made: above 0 to 1, or low (0.3) or high (0.7)."""

        @field_validator("ratio", mode="before")
        @classmethod
        def _preset(cls, given: Any) -> Any:
            return PRESETS.get(given, given) if isinstance(given, str) else given
