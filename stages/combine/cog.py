"""COG: combine Gaussian seeds into a Gaussian seed.

Bodin et al., arXiv:2408.08558, Eq. 3 (later called LOL). For i.i.d. x_k ~ N(μ, Σ), y = Σ w_k x_k has mean αμ
and covariance βΣ with α = Σ w_k and β = Σ w_k². Then z = (1 − α/√β)·μ + y/√β is N(μ, Σ) again. Only μ must be
known: Σ, of any scale or shape, is kept. Interpolation is w = (1 − t, t), a centroid is w = 1/K.

Departures: an all-zero row of weights raises instead of becoming uniform. A centroid may also draw its
weights (`weights: dirichlet`), because K of N seeds have only N-over-K centroids, each one image. On the
great circle of two orthogonal seeds of one norm COG is at the angle atan(t/(1−t)) (18.4° at ¼), where SLERP
is at t·90° (22.5°): nearer to the end points, where images are better; `pace: angle` gives it SLERP's
weights.

The seeds are taken as independent. Inverted seeds of one class are not quite: with correlation ρ the
centroid's squared norm is d·(1 + (K−1)ρ), and `whiten: true` makes it d.

Shape letters: *B any batch, K inputs, C H W latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from schemas.records import Combination
from stages import registry
from stages.combine.draw import GroupSettings, PaceSettings, group, pair, refuse_idle
from stages.combine.latents import weighted_sum
from stages.combine.lerp import chord_fraction
from stages.combine.whiten import whiten
from stages.contract import Chance, Combine


def cog(
    z: Float[Tensor, "*#B K C H W"],
    w: Float[Tensor, "*#B K"] | None = None,
    mean: float | Float[Tensor, "C _ _"] = 0.0,
) -> Float[Tensor, "*B C H W"]:
    """(1 − α/√β)·μ + Σ w_k z_k/√β, in float64: N(μ, Σ) if the z_k are i.i.d. N(μ, Σ) and independent of w.

    Many rows of weights for one set of seeds, a set of seeds for each row, or one row for many sets.
    """
    if z.ndim < 4:
        raise ValueError(f"a group of seeds must have shape (..., K, C, H, W), given {tuple(z.shape)}")
    w = torch.ones(z.shape[-4], dtype=torch.float64, device=z.device) if w is None else w.double()
    if w.ndim < 1 or w.shape[-1] != z.shape[-4]:
        raise ValueError(f"{z.shape[-4]} seeds need as many weights in each row, given {tuple(w.shape)}")
    if any(a != b for a, b in zip(z.shape[-5::-1], w.shape[-2::-1], strict=False) if 1 not in (a, b)):
        raise ValueError(f"weights {tuple(w.shape)} do not fit seeds {tuple(z.shape)}")
    beta = w.square().sum(dim=-1, keepdim=True)
    if not bool((beta > 0).all()):
        raise ValueError("a row of weights is all zero: it has no direction to go")
    w = w / beta.sqrt()
    shrink = w.sum(dim=-1)[..., None, None, None]
    return ((1 - shrink) * mean + weighted_sum(z.double(), w)).to(z.dtype)


@registry.method("cog")
class Cog(Combine):
    """Two seeds and a point between them, or the centroid of a random group."""

    class Config(PaceSettings, GroupSettings):
        method: Literal["cog"] = "cog"
        mode: Literal["interpolation", "centroid"] = "interpolation"
        """interpolation: two distinct seeds and a point between them; centroid: a group of distinct seeds."""

        @model_validator(mode="after")
        def _nothing_idle(self) -> Cog.Config:
            used = {"interpolation": ("t", "points", "pace"), "centroid": ("group", "weights")}
            refuse_idle(self, self.mode, used)
            return self

    def seeds_needed(self) -> int:
        return 2 if self.config.mode == "interpolation" else self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        if self.config.mode == "interpolation":
            return pair(chance, seeds, self.config.t, self.config.points)
        return group(chance, seeds, self.config.group, self.config.weights)

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        w_K = torch.tensor(weights, dtype=torch.float64, device=z_KCHW.device)
        if self.config.whiten:
            z_KCHW = whiten(z_KCHW)
        if self.config.mode == "interpolation" and self.config.pace == "angle":
            along = chord_fraction(z_KCHW[0], z_KCHW[1], weights[1])
            w_K = torch.stack([1 - along, along])
        return cog(z_KCHW, w_K)
