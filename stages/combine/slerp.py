"""SLERP: a point on the great circle between two seeds.

Shoemake, SIGGRAPH 1985; for diffusion seeds Song et al., arXiv:2010.02502, Appendix D.5. As in NAO's code the
angle is that of the normalised seeds and the weights act on the seeds themselves, so that the norm runs
from one to the other, and nearly parallel seeds (cos > 0.9995) are interpolated linearly. For seeds of equal
norm t is the fraction of the angle; else the point is drawn towards the longer seed.

Departure: opposite seeds have no one great circle between them; they raise instead of giving noise.

Shape letters: *B any batch, C H W latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.combine.draw import PairMethod, PairSettings
from stages.combine.latents import LATENT, norms, pair_double

PARALLEL = 0.9995  # NAO's code
OPPOSITE = -1 + 1e-9  # an angle within 5e-5 of π, where float32 seeds no longer determine a plane


def slerp_weights(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """sin((1−t)θ) / sin θ and sin(tθ) / sin θ, in float64; 1 − t and t for nearly parallel seeds."""
    a, b, t_B111 = pair_double(z0, z1, t)
    cosine_B = ((a * b) / (norms(a) * norms(b))).sum(dim=LATENT)
    if not bool((cosine_B > OPPOSITE).all()):
        raise ValueError(f"no great circle between two seeds whose cosine is {float(cosine_B.min())}")
    t_B = t_B111[..., 0, 0, 0]
    theta_B = cosine_B.clamp(max=PARALLEL).arccos()
    parallel_B = cosine_B > PARALLEL
    return (
        torch.where(parallel_B, 1 - t_B, ((1 - t_B) * theta_B).sin() / theta_B.sin()),
        torch.where(parallel_B, t_B, (t_B * theta_B).sin() / theta_B.sin()),
    )


def slerp(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B C H W"]:
    """[sin((1−t)θ)·z0 + sin(tθ)·z1] / sin θ, in float64."""
    w0_B111, w1_B111 = (w_B[..., None, None, None] for w_B in slerp_weights(z0, z1, t))
    return (w0_B111 * z0.double() + w1_B111 * z1.double()).to(z0.dtype)


@registry.method("slerp")
class Slerp(PairMethod):
    """Two distinct seeds, and a point between them drawn uniformly in angle."""

    class Config(PairSettings):
        method: Literal["slerp"] = "slerp"

    def between(
        self, z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float
    ) -> Float[Tensor, "C H W"]:
        return slerp(z0_CHW, z1_CHW, t)
