"""COG: combine Gaussian seeds into a Gaussian seed.

Bodin et al., arXiv:2408.08558, Eq. 3 (later called LOL). For i.i.d. x_k ~ N(μ, Σ), y = Σ w_k x_k has mean αμ
and covariance βΣ with α = Σ w_k and β = Σ w_k². Then z = (1 − α/√β)·μ + y/√β is N(μ, Σ) again, for any Σ.
Interpolation is w = (1 − t, t), a centroid is w = 1/K.

Departures: an all-zero row of weights raises instead of becoming uniform. A centroid may also draw its
weights (`weights: dirichlet`), because K of N seeds have only N-over-K centroids, each one image.

The seeds are taken as independent. Inverted seeds of one class are not quite: with correlation ρ the
centroid's squared norm is d·(1 + (K−1)ρ).

Shape letters: B outputs, K inputs, C H W latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.records import Combination
from stages import registry
from stages.combine.draw import GroupSettings, PairSettings, group, pair
from stages.contract import Chance, Combine


def combine_cog(
    w_BK: Float[Tensor, "B K"],
    z_KCHW: Float[Tensor, "K C H W"],
    mean: float | Float[Tensor, "C _ _"] = 0.0,
) -> Float[Tensor, "B C H W"]:
    """(1 − α/√β)·μ + w·z/√β per row, in float64: N(μ, Σ) if z is i.i.d. N(μ, Σ) and independent of w."""
    w = w_BK.double()
    beta_B = w.square().sum(dim=1)
    if not bool((beta_B > 0).all()):
        raise ValueError("a row of weights is all zero: it has no direction to go")
    shrink_B111 = (w.sum(dim=1) / beta_B.sqrt())[:, None, None, None]
    y_BCHW = torch.einsum("bk,kchw->bchw", w / beta_B.sqrt()[:, None], z_KCHW.double())
    return ((1 - shrink_B111) * mean + y_BCHW).to(z_KCHW.dtype)


@registry.method("cog")
class Cog(Combine):
    """Two seeds and a point between them, or the centroid of a random group."""

    class Config(PairSettings, GroupSettings):
        method: Literal["cog"] = "cog"
        mode: Literal["interpolation", "centroid"] = "interpolation"
        """interpolation: two distinct seeds and a point between them; centroid: a group of distinct seeds."""

    def seeds_needed(self) -> int:
        return 2 if self.config.mode == "interpolation" else self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        if self.config.mode == "interpolation":
            return pair(chance, seeds, self.config.t, self.config.points)
        return group(chance, seeds, self.config.group, self.config.weights)

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        w_1K = torch.tensor([weights], dtype=torch.float64, device=z_KCHW.device)
        return combine_cog(w_1K, z_KCHW)[0]
