"""Geodesic few-shot sampling: a uniform point on one of the great circles between N reference seeds.

Ramachandran et al., AAAI 2024, "Understanding the generalization of pretrained diffusion models on
out-of-distribution data": z(α) = [sin((1−α)φ)·z_S + sin(αφ)·z_T] / sin φ, φ = arccos⟨z_S, z_T⟩, α ~ U(0, 1),
on one of the N-over-2 pairs.

Departures: the arccos is only defined for normalised latents, so the seeds are first brought to norm √d, and
stay there; the pairs are not drawn each by itself but dealt: every pair once, in an order of its own for each
round, before any comes again, so that few candidates already cover the class.

Shape letters: *B any batch, C H W latent.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from schemas.records import Combination
from stages import registry
from stages.combine.draw import PairMethod, PairSettings, place
from stages.combine.latents import dimensions, pair_double, to_norm
from stages.combine.slerp import slerp
from stages.contract import Chance


def geodesic(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B C H W"]:
    """The point at the fraction t of the angle, at norm √d, in float64."""
    a, b, _ = pair_double(z0, z1, t)
    norm = math.sqrt(dimensions(z0))
    # once more at the end: between nearly parallel seeds slerp takes the chord
    return to_norm(slerp(to_norm(a, norm), to_norm(b, norm), t), norm).to(z0.dtype)


@registry.method("geodesic")
class Geodesic(PairMethod):
    """Every pair of seeds in turn, and a point between them drawn uniformly in angle."""

    class Config(PairSettings):
        method: Literal["geodesic"] = "geodesic"

    def draw(self, chance: Chance, seeds: int) -> Combination:
        t, points = self.config.t, self.config.points
        deal, card = divmod(chance.index // (points or 1), math.comb(seeds, 2))
        dealt = chance.shared("great circles", deal).permutation(math.comb(seeds, 2))
        return Combination(unrank(int(dealt[card])), place(chance, chance.own(), t, points))

    def between(
        self, z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float
    ) -> Float[Tensor, "C H W"]:
        return geodesic(z0_CHW, z1_CHW, t)


def unrank(pair: int) -> tuple[int, int]:
    """Pair number n of 0 < 1, 0 < 2, 1 < 2, 0 < 3, …"""
    second = (1 + math.isqrt(1 + 8 * pair)) // 2
    return pair - second * (second - 1) // 2, second
