"""Means of a group of seeds, as they are and brought to the norm of typical noise.

The mean of K independent seeds has norm √(d/K), far inside the sphere near which seeds lie. What is done
about it: `euclidean` nothing; `normalized` norm √(d−1), the mode of |z| for z ~ N(0, I) (Samuel et al.,
NeurIPS 2023, NAO); `mode_norm` norm √(d−2), the root of the mode of |z|² (Bodin et al., arXiv:2408.08558,
COG); `standardized` mean 0 and standard deviation 1 over the elements, so that the norm is √d (baseline of
the same paper).

For independent seeds the last three and COG's centroid differ in norm by less than 1 % and, but for the
removed mean of the elements, not in direction.

Shape letters: *B any batch, K seeds, C H W latent.
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.combine.draw import GroupMethod, GroupSettings
from stages.combine.latents import LATENT, dimensions, group_double, to_norm, weighted_sum


def _mean(z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None) -> Float[Tensor, "*B C H W"]:
    return weighted_sum(*group_double(z, w))


def euclidean(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """Σ w_k z_k, the weights summing to 1, in float64."""
    return _mean(z, w).to(z.dtype)


def normalized(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """The mean at norm √(d−1), in float64."""
    return to_norm(_mean(z, w), math.sqrt(dimensions(z) - 1)).to(z.dtype)


def mode_norm(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """The mean at norm √(d−2), in float64."""
    return to_norm(_mean(z, w), math.sqrt(dimensions(z) - 2)).to(z.dtype)


def standardized(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """The mean, its elements shifted to mean 0 and scaled to standard deviation 1, in float64."""
    mean = _mean(z, w)
    return to_norm(mean - mean.mean(dim=LATENT, keepdim=True), math.sqrt(dimensions(z))).to(z.dtype)


@registry.method("euclidean")
class Euclidean(GroupMethod):
    """The mean of a random group of seeds."""

    class Config(GroupSettings):
        method: Literal["euclidean"] = "euclidean"

    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        return euclidean(z_KCHW, w_K)


@registry.method("normalized")
class Normalized(GroupMethod):
    """The mean of a random group of seeds, at norm √(d−1)."""

    class Config(GroupSettings):
        method: Literal["normalized"] = "normalized"

    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        return normalized(z_KCHW, w_K)


@registry.method("mode_norm")
class ModeNorm(GroupMethod):
    """The mean of a random group of seeds, at norm √(d−2)."""

    class Config(GroupSettings):
        method: Literal["mode_norm"] = "mode_norm"

    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        return mode_norm(z_KCHW, w_K)


@registry.method("standardized")
class Standardized(GroupMethod):
    """The mean of a random group of seeds, with elements of mean 0 and standard deviation 1."""

    class Config(GroupSettings):
        method: Literal["standardized"] = "standardized"

    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        return standardized(z_KCHW, w_K)
