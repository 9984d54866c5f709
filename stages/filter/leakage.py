"""Leakage filter: is the image too near to one that is held out for testing?

The score is the highest cosine between its features and those of an image of the held-out set, of whatever
class; with it the place of that image is kept, so that a verdict can name it.

Shape letters: B images, N held-out images, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, SerializeAsAny
from torch import Tensor

from schemas.records import Verdict
from schemas.settings import Settings
from stages import registry
from stages.choice import MethodSettings
from stages.contract import Filter, Models, Question


@registry.method("leakage")
class Leakage(Filter):
    """Rejects an image that is nearly a held-out one."""

    compares = "held_out"

    class Config(Settings):
        method: Literal["leakage"] = "leakage"
        held_out: Annotated[SerializeAsAny[Settings], MethodSettings("read", "kind", "imagefolder")]
        """The held-out images: a source, written as `references` are."""
        model: str = "clip:tangram"
        """Extractor: tangram, clip:NAME, a folder, timm:NAME, hf-hub:owner/name, or
        package.module:factory."""
        cosine: float = Field(0.995, ge=-1, le=1)
        """Images of at least this cosine to a held-out one are rejected."""

    def models(self) -> Mapping[str, str]:
        return {"extractor": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return {"method": "leakage", "model": self.config.model}

    def columns(self) -> tuple[str, ...]:
        return ("cosine", "nearest")

    def prepare(self, models: Models, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> dict[str, Tensor]:
        return {"embedding": torch.cat([self._features(models, image_B3hw).cpu() for image_B3hw in batches])}

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        held_out_NE = question.artifact["embedding"]
        feature_BE = self._features(models, image_B3hw).to(held_out_NE.device)
        cosine_B, nearest_B = (feature_BE @ held_out_NE.T).max(dim=1)
        return {"cosine": cosine_B.tolist(), "nearest": nearest_B.tolist()}

    def _features(self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]:
        with torch.no_grad():
            return F.normalize(models.extractor(self.config.model).features(image_B3hw).float(), dim=1)

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """A NaN score is no evidence for the image: it is rejected."""
        score, threshold = scores["cosine"], self.config.cosine
        passed, place = score < threshold, int(scores["nearest"])
        name = self.compared[place].origin if place < len(self.compared) else f"number {place}"
        sign = "<" if passed else "≥"
        reason = f"cosine {score:.4g} {sign} {threshold:g} to the held-out image {name}"
        return Verdict(passed, "leakage.cosine", score, threshold, reason)
