"""LERP: a point on the straight line between two seeds. A baseline: seeds lie near a sphere, chords do not.

The baseline of Samuel et al., NeurIPS 2023 (NAO), Table 1. Halfway between two independent seeds the elements
have a standard deviation of 1/√2, which no sampler has seen.

At `pace: angle` t is SLERP's: the chord is cut where SLERP's point at t is seen from 0.

Shape letters: *B any batch, C H W latent.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.combine.draw import PaceSettings, PairMethod
from stages.combine.latents import pair_double
from stages.combine.slerp import slerp_weights


def lerp(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B C H W"]:
    """(1−t)·z0 + t·z1, in float64."""
    a, b, t_B111 = pair_double(z0, z1, t)
    return ((1 - t_B111) * a + t_B111 * b).to(z0.dtype)


def chord_fraction(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B"]:
    """The fraction of the chord at which LERP (and COG, which is its rescaling) has SLERP's direction at
    t."""
    w0_B, w1_B = slerp_weights(z0, z1, t)
    return w1_B / (w0_B + w1_B)


@registry.method("lerp")
class Lerp(PairMethod):
    """Two distinct seeds, and a point on the chord between them."""

    class Config(PaceSettings):
        method: Literal["lerp"] = "lerp"

    def between(
        self, z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float
    ) -> Float[Tensor, "C H W"]:
        along = chord_fraction(z0_CHW, z1_CHW, t) if self.config.pace == "angle" else t
        return lerp(z0_CHW, z1_CHW, along)
