"""In-batch similarity: how much an image looks like the others of its device batch.

MinorityPrompt (Um & Ye, arXiv:2410.07838), Table 3, after Corso et al., arXiv:2310.13102: the mean cosine
between the features of two images of a batch. Here each image has its own mean over the others; the mean of
these over a batch is the published number.

The batch is the recipe's (`batch`), so it does not depend on workers or on which candidates are accepted. A
candidate that failed is in it as a grey image and is left out. Where there is no other image, the similarity
is not a number.

Departure: the features are those of the CLIP model that is named here, so figures compare only under one
model and one size of batch.

Shape letters: B images, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from schemas.settings import Settings
from stages import registry
from stages.contract import Measure, Models, Question


def mean_cosine_to_others(image_BE: Float[Tensor, "B E"], there_B: Bool[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The mean cosine of each row with the other rows that are there, in float64; NaN where there is none."""
    unit_BE = F.normalize(image_BE.double(), dim=1)
    others_BB = there_B[None] & ~torch.eye(len(image_BE), dtype=torch.bool, device=image_BE.device)
    cosine_BB = (unit_BE @ unit_BE.T).where(others_BB, 0)
    return cosine_BB.sum(dim=1) / others_BB.sum(dim=1)


@registry.method("similarity")
class Similarity(Measure):
    class Config(Settings):
        method: Literal["similarity"] = "similarity"
        model: str = "tangram"
        """CLIP model: tangram, a folder, hf-hub:owner/name, open_clip's ARCHITECTURE/WEIGHTS, or
        package.module:Class."""

    def models(self) -> Mapping[str, str]:
        return {"clip": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return self.config.model_dump()

    def columns(self) -> tuple[str, ...]:
        return ("similarity",)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        # No decoded byte is exactly 0 on [-1, 1] (127.5 of 255), so only what failed is 0 all over.
        there_B = image_B3hw.flatten(1).any(dim=1)
        with torch.no_grad():
            image_BE = models.clip(self.config.model).encode_image(image_B3hw)
        similarity_B = mean_cosine_to_others(image_BE, there_B.to(image_BE.device))
        return {"similarity": similarity_B.tolist()}
