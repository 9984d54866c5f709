"""GeNIe: hard negatives, from an image of one class and the prompt of another.

Koohpayegani et al., arXiv:2312.02548, §3. The source's latent is noised to the ratio r and drawn again with
the target's prompt, ⌊r·steps⌋ steps (`stages.generate.redraw`): what is coarse stays the source's, what is
named becomes the target's. Published: r = 0.8 for most tables, 0.5 to 0.9 studied, 50 steps, guidance 7.5.

Beyond the paper: with `token` the target is named by a word learned from its own references, for classes that
the model has no word for (`stages.generate.textual_inversion`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from stages import registry
from stages.contract import Backbone, Order
from stages.generate.redraw import FixedRedraw, RedrawSettings
from stages.generate.textual_inversion import LearnsToken, TokenSettings
from stages.sampling import Condition


@registry.method("genie")
class Genie(LearnsToken, FixedRedraw):
    """Images of the target class that look like an image of another one."""

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "source"

    class Config(RedrawSettings):
        method: Literal["genie"] = "genie"
        ratio: float = Field(0.8, gt=0, le=1)
        """Noise ratio r, the share of the steps that are made: above 0 to 1, which forgets the source."""
        token: TokenSettings | None = None
        """How a word for the target is learned from its references, {} for the defaults; null: it is not."""

    def asked(self, backbone: Backbone, order: Order) -> tuple[Sequence[str], Condition]:
        if self.config.token is None:
            return FixedRedraw.asked(self, backbone, order)
        return super().asked(backbone, order)
