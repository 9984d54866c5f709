"""DA-Fusion: the class's own references, redrawn with a word that was learned from them.

Trabucco et al., arXiv:2302.07944, with the settings of the authors' code: textual inversion of the class
(`stages.generate.textual_inversion`), then image-to-image with "a photo of a v" at a strength drawn for each
image from {1.0, 0.75, 0.5, 0.25}, each with probability ¼, guidance 7.5, ⌊50·strength⌋ steps.

Departures: those of textual inversion and of `stages.generate.redraw`. The learned word stands in the build's
own prompt, in place of the class.

Shape letters: see `stages.generate.redraw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages import registry
from stages.contract import Backbone, Generated, Models, Order
from stages.generate.redraw import Redraw, RedrawSettings
from stages.generate.textual_inversion import LearnsToken, TokenSettings


@registry.method("da_fusion")
class DaFusion(LearnsToken, Redraw):
    """References of the class, changed by more or less, towards a word learned from all of them."""

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "reference"

    class Config(RedrawSettings):
        method: Literal["da_fusion"] = "da_fusion"
        token: TokenSettings = TokenSettings()
        """How the word is learned."""
        strengths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (
            1.0,
            0.75,
            0.5,
            0.25,
        )
        """Noise ratios of which each image draws one, all equally probable; those of DA-Fusion's command."""

    def ratios(self) -> Sequence[float]:
        return self.config.strengths

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        strengths = self.config.strengths
        drawn = [strengths[chance.own().integers(len(strengths))] for chance in order.chances]
        return self.redrawn(backbone, order, drawn)
