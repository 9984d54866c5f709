"""CLIPScore: how well an image fits the prompt of its class.

Hessel et al., arXiv:2104.08718, Eq. 1: w·max(cos(image, text), 0).

Departures: w = 100, as in the tables of MinorityPrompt (Um & Ye, arXiv:2410.07838) and most others; the paper
has 2.5. The text is the class's prompt as it stands, without the paper's prefix "A photo depicts", and also
for an image that was drawn from other words, so that all images of a class answer one question.

Shape letters: B images, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from schemas.settings import Settings
from stages import registry
from stages.contract import Measure, Models, Question

WEIGHT = 100


def clip_score(image_BE: Float[Tensor, "B E"], text_E: Float[Tensor, " E"]) -> Float[Tensor, " B"]:
    """From 0 to 100, in float64."""
    cosine_B = F.cosine_similarity(image_BE.double(), text_E.double()[None], dim=1)
    return WEIGHT * cosine_B.clamp(min=0)


@registry.method("clip_score")
class ClipScore(Measure):
    class Config(Settings):
        method: Literal["clip_score"] = "clip_score"
        model: str = "tangram"
        """CLIP model: tangram, a folder, hf-hub:owner/name, open_clip's ARCHITECTURE/WEIGHTS, or
        package.module:Class. Scores of two do not compare."""

    def models(self) -> Mapping[str, str]:
        return {"clip": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return self.config.model_dump()

    def columns(self) -> tuple[str, ...]:
        return ("clip_score",)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        clip = models.clip(self.config.model)
        with torch.no_grad():
            (text_E,) = clip.encode_text([question.prompt])
            return {"clip_score": clip_score(clip.encode_image(image_B3hw), text_E).tolist()}
