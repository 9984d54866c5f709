"""What the settings of every inversion share: the gate that its seeds must pass."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.settings import Settings


class Typical(Settings):
    """How far a seed may be from Gaussian noise; one that is farther is not combined."""

    norm: float | None = Field(0.15, gt=0)
    """At most so far may |z|/√d be from 1."""
    autocorrelation: float | None = Field(0.15, gt=0)
    """At most so large may the lag-1 autocorrelation be, either sign."""
    kurtosis: float | None = Field(3.0, gt=0)
    """At most so large may the excess kurtosis be, either sign."""
    steps: int | None = Field(None, ge=1)
    """A seed that is refused is inverted once more with so many steps. Not set: it is given up at once."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Typical:
        if self.norm is self.autocorrelation is self.kurtosis is None:
            raise PydanticCustomError(
                "said", "norm, autocorrelation and kurtosis are all off; set one, or leave the gate out"
            )
        return self


class InvertSettings(Settings):
    """Base of the settings of an inversion."""

    steps: int = Field(50, ge=1)
    """Sampler steps; 50 in NAO's code, 400 in COG's experiments."""
    guidance: float = Field(1.0, ge=0)
    """Scale of classifier-free guidance. 1 (none) in NAO and COG: guidance makes inversion diverge."""
    typical: Typical | None = None
    """The gate that seeds must pass; none: every seed is used."""

    @model_validator(mode="after")
    def _another_inversion_differs(self) -> InvertSettings:
        if self.typical is not None and self.typical.steps == self.steps:
            raise PydanticCustomError(
                "said",
                "typical.steps is {steps}, and so is steps: a second inversion would give the same seed; give"
                " more, or leave typical.steps out",
                {"steps": self.steps},
            )
        return self
