"""Sampler steps as rotations: with tan φ = s/a, y = z/√(a² + s²) = cos φ·x0 + sin φ·ε turns at v = dy/dφ.

Salimans & Ho, arXiv:2202.00512, Appendix D: the sampler's step from φ_high down to φ_low is y_low = cos
Δ·y_high − sin Δ·v(y_high) with Δ = φ_high − φ_low. Solved for y_high it divides by cos Δ and never by a, so
it also holds at the first step of a schedule that begins in pure noise (a = 0), where ε says nothing. Of a
diffusion y is z; a rectified flow's steps become rotations too.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

from dataclasses import replace
from math import cos, sin

from jaxtyping import Float
from torch import Tensor

from stages import sampling
from stages.contract import Backbone, Sampler
from stages.sampling import condition, predict_guided
from stages.schedule import Level, Path


def path_of(backbone: Backbone, sampler: Sampler) -> Path:
    """The sampler's path, without a last step that leads nowhere.

    There is one where the last timestep is 0 and the path ends at ᾱ_0.
    """
    path = sampling.path_of(backbone, sampler)
    if path.levels[-1] != path.levels[-2]:
        return path
    return replace(path, times=path.times[:-1], levels=path.levels[:-1])


def velocity(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    t: float,
    level: Level,
    prompt: str,
    guidance: float,
) -> Float[Tensor, "B C H W"]:
    """v = cos φ·ε − sin φ·x0 at time `t`, from a model of any kind and its own latent z."""
    output_BCHW = predict_guided(backbone, z_BCHW, t, condition(backbone, prompt, guidance, len(z_BCHW)))
    match backbone.schedule.prediction:
        case "epsilon":
            return (output_BCHW - level.noise * z_BCHW) / level.signal
        case "v_prediction":
            return output_BCHW
        case "flow":
            return (cos(level.angle) - sin(level.angle)) * z_BCHW + level.scale * output_BCHW


def step_back(
    y_BCHW: Float[Tensor, "B C H W"], v_BCHW: Float[Tensor, "B C H W"], low: Level, high: Level
) -> Float[Tensor, "B C H W"]:
    """y_high from y_low (`y_BCHW`) and the v that the sampler finds at y_high."""
    delta = high.angle - low.angle
    return (y_BCHW + sin(delta) * v_BCHW) / cos(delta)


def velocity_between(
    low_BCHW: Float[Tensor, "B C H W"],
    high_BCHW: Float[Tensor, "B C H W"],
    low: Level,
    high: Level,
) -> Float[Tensor, "B C H W"]:
    """The v with which the sampler steps from y_high to y_low."""
    delta = high.angle - low.angle
    return (cos(delta) * high_BCHW - low_BCHW) / sin(delta)
