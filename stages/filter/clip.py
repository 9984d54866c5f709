"""CLIP filter: does the image look like its class, and less like any other?

Radford et al., arXiv:2103.00020, used as a zero-shot classifier. Two scores an image:

- similarity: cos(image, the target's prompt);
- margin: similarity minus the best similarity of another class's prompt. The zero-shot prediction is the
  target exactly when it is positive. Where a build has one class only there is nothing to confuse it with,
  and the margin is 2, the largest there is.

Shape letters: B images, K prompts, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.records import Verdict
from schemas.settings import Settings
from stages import registry
from stages.contract import Filter, Models, Question

UNRIVALLED = 2.0


def similarity_and_margin(
    image_BE: Float[Tensor, "B E"], text_KE: Float[Tensor, "K E"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Both scores, in float64; the first text is the target's."""
    cosine_BK = F.normalize(image_BE.double(), dim=1) @ F.normalize(text_KE.double(), dim=1).T
    similarity_B = cosine_BK[:, 0]
    if cosine_BK.shape[1] == 1:
        return similarity_B, torch.full_like(similarity_B, UNRIVALLED)
    return similarity_B, similarity_B - cosine_BK[:, 1:].amax(dim=1)


@registry.method("clip")
class ClipFilter(Filter):
    """Accepts an image whose scores reach the thresholds."""

    class Config(Settings):
        method: Literal["clip"] = "clip"
        model: str = "tangram"
        """CLIP model: tangram, a folder, hf-hub:owner/name, open_clip's ARCHITECTURE/WEIGHTS, or
        package.module:Class."""
        margin: float = Field(0.0, ge=-2, le=2)
        """Least margin to the best other class, a difference of cosines."""
        similarity: float | None = Field(None, ge=-1, le=1)
        """Least cosine to the target's prompt; not asked for when not set."""

    def models(self) -> Mapping[str, str]:
        return {"clip": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return {"method": "clip", "model": self.config.model}

    def columns(self) -> tuple[str, ...]:
        return ("similarity", "margin")

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        clip = models.clip(self.config.model)
        with torch.no_grad():
            text_KE = clip.encode_text([question.prompt, *question.others.values()])
            similarity_B, margin_B = similarity_and_margin(clip.encode_image(image_B3hw), text_KE)
        return {"similarity": similarity_B.tolist(), "margin": margin_B.tolist()}

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """A NaN score is no evidence for the image: it is rejected."""
        margin = _verdict("margin", scores["margin"], self.config.margin)
        if self.config.similarity is None or not margin.passed:
            return margin
        similarity = _verdict("similarity", scores["similarity"], self.config.similarity)
        return margin if similarity.passed else similarity


def _verdict(column: str, score: float, threshold: float) -> Verdict:
    passed = score >= threshold
    sign = "≥" if passed else "<"
    return Verdict(passed, f"clip.{column}", score, threshold, f"{column} {score:.4g} {sign} {threshold:g}")
