"""No refinement: the seed is used as it comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Models, Refine, Refined, Resources, Sampler


@registry.method("none")
class NoRefinement(Refine):
    """The identity."""

    resources = Resources(device="cpu")

    class Config(Settings):
        method: Literal["none"] = "none"

    def __call__(
        self,
        backbone: Backbone,
        models: Models,
        z_BCHW: Float[Tensor, "B C H W"],
        prompt: str,
        sampler: Sampler,
        artifact: Mapping[str, Tensor],
    ) -> Refined:
        return Refined(z_BCHW, [[] for _ in z_BCHW])
