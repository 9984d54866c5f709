"""DDIM steps as rotations: with cos φ = √ᾱ, z = cos φ·x0 + sin φ·ε turns at the rate v = dz/dφ.

Salimans & Ho, arXiv:2202.00512, Appendix D: the sampler's step from φ_high down to φ_low is z_low = cos
Δ·z_high − sin Δ·v(z_high) with Δ = φ_high − φ_low. Solved for z_high it divides by cos Δ and never by √ᾱ, so
it also holds at the first step of a schedule that begins in pure noise (ᾱ = 0), where ε says nothing.

Shape letters: B batch, C H W latent. ᾱ is `alpha`.
"""

from __future__ import annotations

from math import atan2, cos, sin

from jaxtyping import Float
from torch import Tensor

from stages.contract import Backbone
from stages.sampling import alphas, condition, predict_guided, timesteps


def path_of(backbone: Backbone, steps: int) -> tuple[list[int], list[float]]:
    """Timesteps of the sampler and ᾱ along its path, without a last step that leads nowhere.

    There is one where the last timestep is 0 and the path ends at ᾱ_0.
    """
    path = timesteps(backbone, steps)
    levels = alphas(backbone, path)
    return (path[:-1], levels[:-1]) if levels[-1] == levels[-2] else (path, levels)


def angle(alpha: float) -> float:
    """φ of a noise level: 0 without noise, π/2 for nothing else."""
    return atan2((1 - alpha) ** 0.5, alpha**0.5)


def velocity(
    backbone: Backbone, z_BCHW: Float[Tensor, "B C H W"], t: int, alpha: float, prompt: str, guidance: float
) -> Float[Tensor, "B C H W"]:
    """v = √ᾱ·ε − √(1−ᾱ)·x0 at timestep `t`, from a model of either kind."""
    output_BCHW = predict_guided(backbone, z_BCHW, t, condition(backbone, prompt, guidance, len(z_BCHW)))
    if backbone.prediction_type == "v_prediction":
        return output_BCHW
    return (output_BCHW - (1 - alpha) ** 0.5 * z_BCHW) / alpha**0.5


def step_back(
    z_BCHW: Float[Tensor, "B C H W"], v_BCHW: Float[Tensor, "B C H W"], alpha_low: float, alpha_high: float
) -> Float[Tensor, "B C H W"]:
    """z_high from z_low (`z_BCHW`) and the v that the sampler finds at z_high."""
    delta = angle(alpha_high) - angle(alpha_low)
    return (z_BCHW + sin(delta) * v_BCHW) / cos(delta)


def velocity_between(
    low_BCHW: Float[Tensor, "B C H W"],
    high_BCHW: Float[Tensor, "B C H W"],
    alpha_low: float,
    alpha_high: float,
) -> Float[Tensor, "B C H W"]:
    """The v with which the sampler steps from z_high to z_low."""
    delta = angle(alpha_high) - angle(alpha_low)
    return (cos(delta) * high_BCHW - low_BCHW) / sin(delta)
