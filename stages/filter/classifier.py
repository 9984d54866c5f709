"""Classifier filter: the probability that a classifier gives to the target class.

Shape letters: B images, K classes, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.records import Verdict
from schemas.settings import Settings
from stages import registry
from stages.backbones.classifier import class_index
from stages.contract import Filter, Models, Question


@registry.method("classifier")
class ClassifierFilter(Filter):
    """Accepts an image that a classifier takes for its class."""

    class Config(Settings):
        method: Literal["classifier"] = "classifier"
        model: str = "tangram"
        """Classifier: tangram, a folder of timm's, transformers' or our layout, timm:NAME, hf-hub:owner/name,
        or package.module:Class."""
        probability: float = Field(0.5, ge=0, le=1)
        """Least probability of the target class."""

    def models(self) -> Mapping[str, str]:
        return {"classifier": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return {"method": "classifier", "model": self.config.model}

    def columns(self) -> tuple[str, ...]:
        return ("probability",)

    def check(self, models: Models, question: Question) -> None:
        class_index(question.target, models.classes(self.config.model), self.config.model)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        classifier = models.classifier(self.config.model)
        index = class_index(question.target, classifier.classes, self.config.model)
        with torch.no_grad():
            probability_BK = classifier.logits(image_B3hw).double().softmax(dim=1)
        return {"probability": probability_BK[:, index].tolist()}

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """A NaN score is no evidence for the image: it is rejected."""
        score, threshold = scores["probability"], self.config.probability
        passed = score >= threshold
        reason = f"probability {score:.4g} {'≥' if passed else '<'} {threshold:g}"
        return Verdict(passed, "classifier.probability", score, threshold, reason)
