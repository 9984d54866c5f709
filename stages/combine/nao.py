"""NAO, exactly: the paths and centroids of least −log likelihood of the norm, without an optimiser.

Samuel et al., NeurIPS 2023, Eq. 2 and 3: the distance f(z1, z2) is the least ∫ w(|γ|)|dγ| over paths γ from
z1 to z2, w = −log χ_d; a centroid is the point with the smallest sum of distances to its seeds. The paper
minimises a sum over n points with Adam, in all d coordinates (`stages.combine.nao_adam`). But w sees only the
norm, so:

- a best path lies in the plane of its ends: what turns out of it can be turned back at no cost. There it is
  known up to integrals in one variable (`stages.combine.radial`, `stages.combine.clairaut`): an arc of a
  great circle at r* = √(d−1) − 0.28/√(d−1), nearly, and layers half a unit thick at its ends that lead to the
  seeds' own norms;
- the sum of distances is m*·Σ w_k·∠(c, z_k) plus what depends on |c| alone: the centroid is the spherical
  geometric median at radius r*, in the seeds' span.

Departures: the integral itself is minimised instead of its midpoint sum, which a few points can underrun by
leaving the sphere between them; so there are no step limit δ and no penalty α. The point at t has swept the
fraction t of the path's angle. Between opposite seeds every great circle is as good: their distance is given,
their path raises. A centroid has norm r* also when its seeds nearly coincide (the layers, e^(−κθ), then
overlap and would draw it to the seeds' mean norm); and that of two seeds, where all points of the arc tie, is
its middle. Norms below 0.35·√(d−1) are refused, because near the origin the cheapest way is another.

Shape letters: *B any batch, N rows of it, T points of a path, K seeds, C H W latent, D = C·H·W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import legendre
from pydantic import model_validator
from scipy.special import xlogy
from torch import Tensor

from schemas.records import Combination
from stages import registry
from stages.combine.clairaut import plane_cost, plane_radii
from stages.combine.draw import GroupSettings, PairSettings, group, pair, place, refuse_idle
from stages.combine.geometric_median import geometric_median
from stages.combine.latents import dimensions, group_double, pair_double, to_norm
from stages.combine.radial import radial
from stages.combine.whiten import whiten
from stages.contract import Chance, Combine

OPPOSITE = 5e-5  # radians from π, within which float32 seeds no longer determine a plane


def distance(z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B"]:
    """f, the cost of the exact path, in float64."""
    z0, z1, _ = pair_double(z0, z1, 0.0)
    r_N2, angle_N, _ = _plane(z0, z1)
    cost_N = plane_cost(dimensions(z0), r_N2, angle_N)
    return torch.from_numpy(cost_N).reshape(z0.shape[:-3]).to(z0.device)


def nao(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> Float[Tensor, "*B C H W"]:
    """The point of the exact path where a fraction t of its angle is behind, in float64."""
    a, b, t_B111 = pair_double(z0, z1, t)
    return _points(a, b, t_B111.reshape(-1, 1))[..., 0, :, :, :].to(z0.dtype)


def nao_path(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], n: int
) -> Float[Tensor, "*B T C H W"]:
    """n points of the exact path at equal angles, both ends included, in float64."""
    if n < 2:
        raise ValueError(f"a path has at least its two ends, n = {n} given")
    a, b, _ = pair_double(z0, z1, 0.0)
    t_1T = torch.linspace(0, 1, n, dtype=torch.float64, device=z0.device)[None]
    return _points(a, b, t_1T.expand(a[..., 0, 0, 0].numel(), n)).to(z0.dtype)


def nao_centroid(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B C H W"]:
    """argmin over c of Σ w_k·f(c, z_k), in float64."""
    seeds, w = group_double(z, w)
    return to_norm(geometric_median(seeds, w), radial(dimensions(z)).best).to(z.dtype)


def nao_centroid_paths(
    z: Float[Tensor, "*B K C H W"], n: int, w: Float[Tensor, "*B K"] | None = None
) -> Float[Tensor, "*B K T C H W"]:
    """n points of the path from each seed to the centroid, both included: what NAO gives to SeedSelect."""
    seeds = group_double(z, w)[0]
    c = nao_centroid(seeds, w)[..., None, :, :, :].expand_as(seeds)
    return nao_path(seeds, c, n).to(z.dtype)


def line_cost(z: Float[Tensor, "*B T C H W"]) -> Float[Tensor, "*B"]:
    """∫ w(|γ|)|dγ| along straight lines from point to point, in closed form, in float64.

    On a line at distance h from the origin, l from its foot: (d−1)·ρ² = h² + l².
    """
    if z.ndim < 4:
        raise ValueError(f"a path must have shape (..., points, C, H, W), given {tuple(z.shape)}")
    g = radial(dimensions(z))
    x = z.double().flatten(-3)
    steps = x[..., 1:, :] - x[..., :-1, :]
    length = steps.norm(dim=-1)
    start = (x[..., :-1, :] * steps).sum(dim=-1) / length.clamp(min=1e-300)
    h = (x[..., :-1, :].square().sum(dim=-1) - start.square()).clamp(min=0).sqrt()
    foot, low, high = (v.cpu().numpy() for v in (h, start, start + length))

    def primitive(l: np.ndarray) -> np.ndarray:  # noqa: E741
        squared = (foot**2 * l + l**3 / 3) / g.n
        logarithm = xlogy(l, (foot**2 + l**2) / g.n) - 2 * l + 2 * foot * np.arctan2(l, foot)
        return g.floor * l + g.n / 2 * (squared - l - logarithm)

    return torch.as_tensor(np.sum(primitive(high) - primitive(low), axis=-1), device=z.device)


def curve_cost(curve: Callable[[float], Float[Tensor, "*B C H W"]], pieces: int = 1) -> Float[Tensor, "*B"]:
    """∫ w(|γ|)|dγ| of a float64 curve over t from 0 to 1, smooth in each of `pieces` equal parts.

    Gauss–Legendre in each, with the derivative of the polynomial through its 32 nodes: exact to rounding for
    a curve as smooth as SLERP.
    """
    x, weights = legendre.leggauss(32)
    slope = legendre.legval(x, legendre.legder(np.linalg.inv(legendre.legvander(x, 31)))).T
    total: float | np.ndarray = 0.0
    for piece in range(pieces):
        z_T = torch.stack([curve(float(t)) for t in (piece + (x + 1) / 2) / pieces])
        x_TD = z_T.flatten(-3).cpu().numpy()
        w_T = radial(x_TD.shape[-1]).weight(np.linalg.norm(x_TD, axis=-1))
        speed_T = np.linalg.norm(np.tensordot(slope, x_TD, axes=1), axis=-1)
        total = total + np.tensordot(weights, w_T * speed_T, axes=1)
    return torch.as_tensor(total, device=z_T.device)


def _plane(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"]
) -> tuple[
    Float[np.ndarray, "N 2"], Float[np.ndarray, " N"], tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]
]:
    """Radii, angles (exact also near 0 and π), and unit vectors of pairs of seeds."""
    a_ND, b_ND = (z.reshape(-1, dimensions(z)) for z in (z0, z1))
    r_N2 = torch.stack([a_ND.norm(dim=1), b_ND.norm(dim=1)], dim=1)
    radial(a_ND.shape[1]).depth(r_N2.cpu().numpy())  # refuses what has no direction
    a_ND, b_ND = a_ND / r_N2[:, :1], b_ND / r_N2[:, 1:]
    angle_N = 2 * torch.atan2((a_ND - b_ND).norm(dim=1), (a_ND + b_ND).norm(dim=1))
    return r_N2.cpu().numpy(), angle_N.cpu().numpy(), (a_ND, b_ND)


def _points(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t_NT: Float[Tensor, "N T"]
) -> Float[Tensor, "*B T C H W"]:
    """Points of exact paths; float64 in and out."""
    r_N2, angle_N, (a_ND, b_ND) = _plane(z0, z1)
    if (math.pi - angle_N < OPPOSITE).any():
        raise ValueError(
            "two opposite seeds have no one path between them, all great circles cost the same: leave one out"
        )
    t = t_NT.cpu().numpy()
    theta_N1 = angle_N[:, None]
    scale = plane_radii(dimensions(z0), r_N2, angle_N, t) / np.where(theta_N1 > 0, np.sin(theta_N1), 1)
    before = np.where(theta_N1 > 0, np.sin((1 - t) * theta_N1), 1) * scale
    after = np.sin(t * theta_N1) * scale
    ab_N2T = torch.from_numpy(np.stack([before, after], axis=-1)).to(z0.device)
    return (ab_N2T @ torch.stack([a_ND, b_ND], dim=1)).reshape(*z0.shape[:-3], t.shape[1], *z0.shape[-3:])


@registry.method("nao")
class Nao(Combine):
    """A point on the exact path between two seeds, the centroid of a group, or a point on the way to it."""

    class Config(PairSettings, GroupSettings):
        method: Literal["nao"] = "nao"
        mode: Literal["path", "centroid", "centroid_paths"] = "path"
        """path: two seeds and a point between them; centroid: of a group; centroid_paths: a group, one of its
        seeds, and a point on the path from it to the centroid (t = 1), as NAO gives them to SeedSelect; with
        `points: n`, K·n candidates share a group of K, n for each of its seeds."""

        @model_validator(mode="after")
        def _nothing_idle(self) -> Nao.Config:
            # in mode centroid_paths the weights of a row say where on a path it is
            path, centroid = ("t", "points"), ("group", "weights")
            used = {"path": path, "centroid": centroid, "centroid_paths": ("group", *path)}
            refuse_idle(self, self.mode, used)
            return self

    def seeds_needed(self) -> int:
        return 2 if self.config.mode == "path" else self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        """In mode centroid_paths the weights are (1 − t)·e_j + t·(1/K, …): t of the way from seed j."""
        config = self.config
        if config.mode == "path":
            return pair(chance, seeds, config.t, config.points)
        if config.mode == "centroid":
            return group(chance, seeds, config.group, config.weights)
        rng = chance.shared("path", chance.index)
        if config.points is None:
            walk, j = chance.index, int(rng.integers(config.group))
        else:
            walk, j = divmod(chance.index // config.points, config.group)
        parents = group(Chance(walk, chance.stream), seeds, config.group, "equal").parents
        stay, t = place(chance, rng, config.t, config.points)
        rest = t / config.group
        return Combination(parents, tuple(stay + rest if k == j else rest for k in range(config.group)))

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        if self.config.whiten:
            z_KCHW = whiten(z_KCHW)
        if self.config.mode == "path":
            return nao(z_KCHW[0], z_KCHW[1], weights[1])
        if self.config.mode == "centroid":
            return nao_centroid(z_KCHW, torch.tensor(weights, dtype=torch.float64, device=z_KCHW.device))
        j = max(range(len(weights)), key=lambda k: weights[k])
        t = min(1.0, len(weights) * min(weights))
        return nao(z_KCHW[j].double(), nao_centroid(z_KCHW.double()), t).to(z_KCHW.dtype)
