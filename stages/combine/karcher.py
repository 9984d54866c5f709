"""Karcher mean: the point of the sphere with the smallest sum of squared angles to a group of seeds.

Karcher, Comm. Pure Appl. Math. 30 (1977); on spheres Buss & Fillmore, ACM Trans. Graphics 20 (2001), whose
second algorithm is Newton's method too. NAO (Samuel et al., NeurIPS 2023) compares with such a "sphere
projection".

It is unique when the seeds lie in one hemisphere. Departures: asked is the simpler condition that every seed
is less than 90° from the group's mean direction; the mean is found in the seeds' span (see
`stages.combine.sphere`) and returned at norm √(d−1), the mode of |z| for z ~ N(0, I).

Shape letters: *B any batch, K seeds, C H W latent.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.combine.draw import GroupMethod, GroupSettings
from stages.combine.latents import dimensions, group_double, to_norm
from stages.combine.sphere import minimise, require_hemisphere, span


def karcher(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """argmin Σ w_k ∠(c, z_k)² over |c| = √(d−1), in float64; weights act by their proportions."""
    seeds, w = group_double(z, w)
    group = span(seeds)
    require_hemisphere(group.p, w)
    c_NK = minimise(group.p.reshape(-1, *group.p.shape[-2:]), w.reshape(-1, w.shape[-1]), power=2)
    return to_norm(group.latent(c_NK.reshape(w.shape)), math.sqrt(dimensions(z) - 1)).to(z.dtype)


@registry.method("karcher")
class Karcher(GroupMethod):
    """The Karcher mean of a random group of seeds."""

    class Config(GroupSettings):
        method: Literal["karcher"] = "karcher"

    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        return karcher(z_KCHW, w_K)
