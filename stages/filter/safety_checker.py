"""Safety checker filter: is an image nearer to an unwanted concept than the checkpoint's own checker allows?

`stages.backbones.safety_checker` says what is computed and by whom it was published. The one score is the
margin: the most by which the cosine to one of the checker's concepts exceeds that concept's threshold. At
`above: 0` the verdict is that of diffusers; a negative value is stricter, a positive one more lenient.

Shape letters: B images, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.records import Verdict
from schemas.settings import Settings
from stages import registry
from stages.contract import Filter, Models, Question


@registry.method("safety_checker")
class SafetyCheckerFilter(Filter):
    """Rejects an image in which a checkpoint's safety checker finds an unwanted concept."""

    class Config(Settings):
        method: Literal["safety_checker"] = "safety_checker"
        model: str = Field(min_length=1)
        """Whose checker: a local folder in the diffusers layout, or a hub id, that has safety_checker/ and
        feature_extractor/, or is the checker itself (CompVis/stable-diffusion-safety-checker)."""
        above: float = Field(0.0, ge=-2, le=2)
        """Images of a greater margin are rejected; a difference of cosines."""

    def models(self) -> Mapping[str, str]:
        return {"safety_checker": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return {"method": "safety_checker", "model": self.config.model}

    def columns(self) -> tuple[str, ...]:
        return ("margin",)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        return {"margin": models.safety_checker(self.config.model).margin(image_B3hw).tolist()}

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """A NaN score is no evidence for the image: it is rejected."""
        score, threshold = scores["margin"], self.config.above
        passed = score <= threshold
        reason = f"margin {score:.4g} {'≤' if passed else '>'} {threshold:g}"
        return Verdict(passed, "safety_checker.margin", score, threshold, reason)
