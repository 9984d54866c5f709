"""When a seed is good enough: rules by which a row stops before its last iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from schemas.settings import Settings
from stages.backbones.classifier import class_index
from stages.contract import Models


class Plateau(Settings):
    """Stop when the loss no longer falls."""

    plateau: float = Field(ge=0)
    """Less than this is no fall, in units of the loss."""
    patience: int = Field(2, ge=1)
    """So many iterations together must not bring such a fall. 2 of NAO's 5: ours."""

    def reached(self, losses: Sequence[float]) -> bool:
        """Whether the last losses of a row are not below the best one before them."""
        before, last = losses[: -self.patience], losses[-self.patience :]
        return len(before) > 0 and min(before) - min(last) <= self.plateau


class Recognised(Settings):
    """Stop when a classifier takes the picture that the sampler draws for its class.

    A filter of the build with the same model then accepts what was made to please it, so its rejects no
    longer say how good the pictures are. It is allowed, because there may be no second classifier; a model of
    its own is better.
    """

    classifier: str
    """Classifier: tangram, a folder of timm's, transformers' or our layout, timm:NAME, hf-hub:owner/name, or
    package.module:Class."""
    probability: float = Field(0.5, gt=0, le=1)
    """Least probability of the target class; 0.5 as in the classifier filter."""

    def check(self, models: Models, target: str) -> None:
        """Raise `UserError` when the classifier does not know the class. Loads no weights."""
        class_index(target, models.classes(self.classifier), self.classifier)

    def reached(self, models: Models, target: str, image_B3hw: Float[Tensor, "B 3 h w"]) -> list[bool]:
        """A picture whose values are not numbers is not recognised."""
        classifier = models.classifier(self.classifier)
        index = class_index(target, classifier.classes, self.classifier)
        with torch.no_grad():
            probability_BK = classifier.logits(image_B3hw.clamp(-1, 1)).double().softmax(dim=1)
        return (probability_BK[:, index] >= self.probability).tolist()


def _kind(given: Any) -> str | None:
    """Which rule is meant: the one whose first key is there."""
    if isinstance(given, Settings):
        given = given.model_dump()
    named = [key for key in ("plateau", "classifier") if isinstance(given, dict) and key in given]
    return named[0] if len(named) == 1 else None


Stop = Annotated[
    Annotated[Plateau, Tag("plateau")] | Annotated[Recognised, Tag("classifier")],
    Discriminator(
        _kind,
        custom_error_type="said",
        custom_error_message="must be {plateau: FALL, patience: ITERATIONS} or {classifier: MODEL, "
        "probability: P}",
    ),
]
