"""Subspaces of seeds: a basis, coordinates, projections, and latents at coordinates.

Bodin et al., arXiv:2408.08558, "subspaces". A = [x_1 … x_K] = QR. A latent x has the projection s(x) = QQᵀx,
and a point of the span has weights w with A·w = s, that is w = A⁺s: for s = Qh at coordinates h they are w =
R⁻¹h. COG's transform of these weights makes the point a Gaussian seed: a direction of the span, at COG's
norm.

Departures: R has a positive diagonal, so that the basis (Gram–Schmidt's) depends on the seeds alone and not
on the library; w = A⁺s is solved through R. As the transform keeps only the direction of h, the slice of
`grid` does not pass through 0, where there is none: it touches the sphere at the centroid.

Shape letters: *B any batch, K seeds of a subspace, C H W latent, N points along a side of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.records import Combination
from schemas.settings import Settings
from stages import registry
from stages.combine.cog import cog
from stages.combine.draw import members
from stages.combine.latents import LATENT, dimensions, group_double, norms, weighted_sum
from stages.combine.whiten import DEPENDENT, whiten
from stages.contract import Chance, Combine


def basis(
    z: Float[Tensor, "*B K C H W"],
) -> tuple[Float[Tensor, "*B K C H W"], Float[Tensor, "*B K K"]]:
    """Orthonormal latents q_k and R with z_k = Σ_j R_jk q_j, R upper triangular with a positive diagonal."""
    seeds, _ = group_double(z, None)
    columns, r = _gram_schmidt(seeds.flatten(-3).mT)
    least = math.sqrt(DEPENDENT) * norms(seeds)[..., 0, 0, 0]
    if z.shape[-4] > dimensions(z) or not bool((r.diagonal(dim1=-2, dim2=-1) > least).all()):
        raise ValueError(
            f"{z.shape[-4]} seeds that are linearly dependent have no {z.shape[-4]}-dimensional subspace;"
            " leave out the one that repeats the others"
        )
    return columns.mT.unflatten(-1, z.shape[-3:]), r


def project(
    x: Float[Tensor, "*#B C H W"], z: Float[Tensor, "*#B K C H W"]
) -> tuple[Float[Tensor, "*B C H W"], Float[Tensor, "*B K"]]:
    """s(x) = QQᵀx, the point of the seeds' span that is nearest to x, and its weights A⁺s(x), in float64."""
    q, r = basis(z)
    h = (q * x.double().unsqueeze(-4)).sum(dim=LATENT)
    return weighted_sum(q, h), _solve(r, h)


def weights_at(h: Float[Tensor, "*#B K"], z: Float[Tensor, "*#B K C H W"]) -> Float[Tensor, "*B K"]:
    """The weights A⁺Qh of the point at coordinates h, in float64."""
    _, r = basis(z)
    if h.ndim < 1 or h.shape[-1] != r.shape[-1]:
        raise ValueError(f"a point of this subspace has {r.shape[-1]} coordinates, given {tuple(h.shape)}")
    return _solve(r, h.double())


def latents_at(h: Float[Tensor, "*#B K"], z: Float[Tensor, "*#B K C H W"]) -> Float[Tensor, "*B C H W"]:
    """The Gaussian seed at coordinates h."""
    return cog(z, weights_at(h, z))


def grid(
    z_KCHW: Float[Tensor, "K C H W"], n: int, extent: float, axes_2K: Float[Tensor, "2 K"] | None = None
) -> Float[Tensor, "N N C H W"]:
    """Seeds at n × n evenly spaced points of a plane that touches the sphere at the seeds' centroid.

    Point (i, j) is `v_i` along the second axis and `v_j` along the first, `v` from −extent to extent; it is
    seen from 0 at the angle atan(√(v_i² + v_j²)) from the centroid, and great circles are straight lines (the
    gnomonic chart). `axes_2K` are two directions in coordinates; their part across the centroid's direction
    is used, made orthonormal. Default: towards the first and the second seed. Then the plane of three
    orthogonal seeds holds them all, at √2 from the middle.
    """
    if n < 2:
        raise ValueError(f"a grid has at least 2 points along each side, given {n}")
    if len(z_KCHW) < 3:
        raise ValueError(f"a plane around a centroid needs at least 3 seeds, given {len(z_KCHW)}")
    _, r_KK = basis(z_KCHW)
    axes_K2 = r_KK[:, :2] if axes_2K is None else axes_2K.double().mT
    frame_K3, scale_33 = _gram_schmidt(torch.cat([r_KK.mean(dim=1, keepdim=True), axes_K2], dim=1))
    if not bool((scale_33.diagonal()[1:] > math.sqrt(DEPENDENT) * axes_K2.norm(dim=0)).all()):
        raise ValueError("the two axes and the direction of the centroid must be linearly independent")
    v_N = torch.linspace(-extent, extent, n, dtype=torch.float64, device=z_KCHW.device)
    centre_K, first_K, second_K = frame_K3.unbind(dim=1)
    h_NNK = centre_K + v_N[None, :, None] * first_K + v_N[:, None, None] * second_K
    return latents_at(h_NNK, z_KCHW)


def _gram_schmidt(a: Float[Tensor, "*B D K"]) -> tuple[Float[Tensor, "*B D R"], Float[Tensor, "*B R K"]]:
    """QR with a positive diagonal of R."""
    q, r = torch.linalg.qr(a)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(a.dtype)
    return q * sign[..., None, :], r * sign[..., :, None]


def _solve(r: Float[Tensor, "*#B K K"], h: Float[Tensor, "*#B K"]) -> Float[Tensor, "*B K"]:
    return torch.linalg.solve_triangular(r, h[..., None], upper=True)[..., 0]


@registry.method("subspace")
class Subspace(Combine):
    """Random points of the subspace of a random group, h ~ N(0, I): uniform over the directions of its span.

    A candidate's weights are its coordinates h in the group's Gram–Schmidt basis, not the w of Σ w_k x_k:
    those depend on the seeds and follow from h (`weights_at`).
    """

    class Config(Settings):
        method: Literal["subspace"] = "subspace"
        group: int = Field(5, ge=2)
        """Seeds that span the subspace; the paper's pictures use 5."""
        whiten: bool = False
        """Make the seeds uncorrelated first (see `stages.combine.whiten`): the span is the same, and the norm
        is √d in every direction."""

    def seeds_needed(self) -> int:
        return self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        rng = chance.own()
        parents = members(rng, seeds, self.config.group)
        return Combination(parents, tuple(float(h) for h in rng.standard_normal(len(parents))))

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        h_K = torch.tensor(weights, dtype=torch.float64, device=z_KCHW.device)
        return latents_at(h_K, whiten(z_KCHW) if self.config.whiten else z_KCHW)
