"""SLERP with the norm of typical noise: a control, equal to NAO's path but for the ends.

The norm of N(0, I) in d dimensions has its mode at √(d−1) (χ_d). Optimal paths of NAO (Samuel et al., NeurIPS
2023) are great-circle arcs at that norm, within 0.003 of it for d = 16384, but for layers at both ends that
join the seeds' own norms. No paper proposes the method; it shows what the optimisation adds to SLERP.

Shape letters: *B any batch, C H W latent.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.combine.draw import PairMethod, PairSettings
from stages.combine.latents import dimensions, to_norm
from stages.combine.slerp import slerp


def slerp_rescaled(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B C H W"]:
    """√(d−1) · slerp / |slerp|, in float64."""
    return to_norm(slerp(z0.double(), z1.double(), t), math.sqrt(dimensions(z0) - 1)).to(z0.dtype)


@registry.method("slerp_rescaled")
class SlerpRescaled(PairMethod):
    """Two distinct seeds, and SLERP's point between them at norm √(d−1)."""

    class Config(PairSettings):
        method: Literal["slerp_rescaled"] = "slerp_rescaled"

    def between(
        self, z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float
    ) -> Float[Tensor, "C H W"]:
        return slerp_rescaled(z0_CHW, z1_CHW, t)
