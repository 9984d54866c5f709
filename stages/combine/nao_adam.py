"""NAO as published: the optimiser of the authors' code. For comparison only; `nao` has the exact solution.

Samuel et al., NeurIPS 2023, Eq. 2 and 3, with the constants of the authors' code: n points, both ends among
them, minimise Σ w(|x_i + x_{i−1}|/2)·|x_i − x_{i−1}| + α·Σ ReLU(|x_i − x_{i−1}| − δ) with w = −log χ_d, α = 1
and δ = 2·|z1 − z0|/n, by Adam at a learning rate of 0.01, from the chord plus U[0, 0.01) on every coordinate,
until the loss changes by less than 0.001 ten times in a row or 10,000 steps are done. For a centroid the
paths from all seeds and the centroid itself are optimised together, until five changes in a row are below
0.01; its loss has a term −log χ_d(|c|) that Eq. 3 has not. All in float32.

What comes out is not what is asked for. Adam scales each coordinate apart, which is no rotation-equivariant
step: it leaves the seeds' span, and as its first steps are 0.01·sign(x), where it stops early the values have
a hole around 0 and are no Gaussian noise (excess kurtosis −1.1 on paths of 11 points, −1.4 to −1.95 for
centroids; uniform noise has −1.2). And it stops early by rounding: in float32 w, a difference of terms as
large as 4·d, comes in steps of 2^−7 at d = 16,384, so that small changes of the loss are chance. Summed in
another order, which makes the steps 8 times finer, the same code runs on to 10,000 steps and nearly heals.

Departure: the noise of the start is drawn from a generator made from the seeds' bytes, so that the same seeds
have the same path everywhere.

Shape letters: *B any batch, T points of a path, K seeds, C H W latent, D = C·H·W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.ids import random_stream, sha256
from schemas.records import Combination
from schemas.settings import Settings
from stages import registry
from stages.combine.draw import group, pair, refuse_idle
from stages.combine.latents import dimensions
from stages.combine.slerp import slerp
from stages.contract import Chance, Combine

LR, STEPS, NOISE = 0.01, 10_000, 0.01
PATH_STOP, CENTROID_STOP = (1e-3, 10), (1e-2, 5)  # the loss changes by less, so often in a row


def discrete_cost(z: Float[Tensor, "*B T C H W"], delta: float = math.inf) -> Float[Tensor, "*B"]:
    """The published objective of a path, both ends included; in the precision of `z`. δ = ∞: no penalty."""
    x = z.flatten(-3)
    length = (x[..., 1:, :] - x[..., :-1, :]).norm(dim=-1)
    r = (x[..., 1:, :] / 2 + x[..., :-1, :] / 2).norm(dim=-1)
    return (minus_log_chi(r, x.shape[-1]) * length + torch.relu(length - delta)).sum(dim=-1)


def minus_log_chi(r: Float[Tensor, "*B"], d: int) -> Float[Tensor, "*B"]:
    """−log χ_d(r), summed in the order of the authors' code, which decides how it is rounded."""
    constant = (0.5 * d - 1) * r.new_tensor(2.0).log() + r.new_tensor(d / 2).lgamma()
    return constant - ((d - 1) * r.log() - 0.5 * r.square())


def adam_path(
    z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], n: int
) -> Float[Tensor, "T C H W"]:
    """n points, both ends included."""
    if n < 3:
        raise ValueError(f"a path needs a point between its ends: n must be at least 3, given {n}")
    a, b = z0_CHW.float(), z1_CHW.float()
    inner = _chord(a, b, n, _noise(a, b))
    delta = float(2 * (a - b).norm() / n)

    def path() -> Tensor:
        return torch.cat([a[None], inner, b[None]])

    _minimise([inner], lambda: discrete_cost(path(), delta), *PATH_STOP)
    return path().detach().to(z0_CHW.dtype)


def adam_centroid(
    z_KCHW: Float[Tensor, "K C H W"], n: int, start: Literal["mean", "slerp"] = "mean"
) -> tuple[Float[Tensor, "C H W"], Float[Tensor, "K T C H W"]]:
    """The centroid, and the n points of the path from each seed to it."""
    if n < 3 or len(z_KCHW) < 2:
        raise ValueError(f"a centroid needs 2 seeds and paths of 3 points, given {len(z_KCHW)} and {n}")
    seeds = z_KCHW.float()
    delta = float(2 * (seeds[0] - seeds[1]).norm() / n)
    centre = (seeds.mean(dim=0) if start == "mean" else slerp(seeds[0], seeds[1], 0.5)).clone()
    rng = _noise(*seeds)
    inner = [_chord(seed, centre, n, rng) for seed in seeds]
    centre.requires_grad_()

    def paths() -> Tensor:
        ends = zip(seeds, inner, strict=True)
        return torch.stack([torch.cat([seed[None], x, centre[None]]) for seed, x in ends])

    def loss() -> Tensor:
        return discrete_cost(paths(), delta).sum() + minus_log_chi(centre.norm(), dimensions(centre))

    _minimise([*inner, centre], loss, *CENTROID_STOP)
    return centre.detach().to(z_KCHW.dtype), paths().detach().to(z_KCHW.dtype)


def _noise(*seeds: Tensor) -> np.random.Generator:
    return random_stream("nao_adam", *(sha256(seed.cpu().numpy().tobytes()) for seed in seeds))


def _chord(a: Tensor, b: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """The inner points of the start."""
    t_T111 = torch.linspace(0, 1, n, device=a.device)[1:-1, None, None, None]
    noise = torch.from_numpy(NOISE * rng.random((n - 2, *a.shape), dtype=np.float32)).to(a.device)
    return (a + t_T111 * (b - a) + noise).requires_grad_()


def _minimise(free: list[Tensor], loss: Callable[[], Tensor], change: float, times: int) -> None:
    """Adam, until the loss has changed by less than `change` so many times in a row."""
    optimizer = torch.optim.Adam(free, lr=LR)
    last, still = math.inf, 0
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            still = still + 1 if abs(last - value.item()) < change else 0
            last = value.item()
            if still == times:
                break


@registry.method("nao_adam")
class NaoAdam(Combine):
    """A point of the optimised path between two seeds, or the optimised centroid of a group."""

    class Config(Settings):
        method: Literal["nao_adam"] = "nao_adam"
        mode: Literal["path", "centroid"] = "path"
        """path: two seeds and a point between them; centroid: of a group."""
        path: int = Field(12, ge=3)
        """Points of a path as it is optimised, both ends included. The paper has 10 between the ends, the
        authors' code 50 in all, COG's comparison 11."""
        points: int | None = Field(None, ge=1)
        """So many candidates share each pair, at evenly spaced inner points of its path. Not set: all inner
        points."""
        group: int = Field(3, ge=2)
        """Seeds in a centroid; the paper uses 3 to 25."""
        start: Literal["mean", "slerp"] = "mean"
        """Where a centroid starts: the seeds' mean (paper), or SLERP(½) of the first two (code)."""

        @model_validator(mode="after")
        def _points_of_the_path(self) -> NaoAdam.Config:
            refuse_idle(self, self.mode, {"path": ("points",), "centroid": ("group", "start")})
            if self.points is not None and (self.path - 1) % (self.points + 1):
                raise PydanticCustomError(
                    "said",
                    "points = {points} are no points of an optimised path of {path}: path − 1 must be a"
                    " multiple of points + 1, as with path: {fit}",
                    {"points": self.points, "path": self.path, "fit": self._fit()},
                )
            return self

        def _fit(self) -> int:
            assert self.points is not None
            return max(1, round((self.path - 1) / (self.points + 1))) * (self.points + 1) + 1

    def __init__(self, config: Config):
        super().__init__(config)
        self._last: tuple[Tensor, Tensor] | None = None

    def seeds_needed(self) -> int:
        return 2 if self.config.mode == "path" else self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        if self.config.mode == "path":
            return pair(chance, seeds, None, self.config.points or self.config.path - 2)
        return group(chance, seeds, self.config.group, "equal")

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        n = self.config.path
        if self.config.mode == "centroid":
            return adam_centroid(z_KCHW, n, self.config.start)[0]
        # the candidates of a pair come one after another, and each would take seconds
        last = self._last
        if last is None or not torch.equal(last[0], z_KCHW):
            self._last = last = z_KCHW.clone(), adam_path(z_KCHW[0], z_KCHW[1], n)
        return last[1][round(weights[1] * (n - 1))]
