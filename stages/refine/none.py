"""No refinement: the seed is used as it comes."""

from __future__ import annotations

from typing import Literal

from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Models, Order, Refine, Refined, Resources, Sampler


@registry.method("none")
class NoRefinement(Refine):
    """The identity."""

    resources = Resources(device="cpu")

    class Config(Settings):
        method: Literal["none"] = "none"

    def __call__(self, backbone: Backbone, models: Models, order: Order, sampler: Sampler) -> Refined:
        return Refined(order.z_BCHW, [[] for _ in order.z_BCHW])
