"""What a candidate draws: a pair of reference seeds and a point between them, or a group and its weights.

Every method of a kind draws alike, so that builds of two methods which differ in nothing else (and have the
same recipe name) combine the same seeds in the same places: a paired comparison.

Shape letters: K seeds, C H W latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.records import Combination
from schemas.settings import Settings
from stages.combine.whiten import whiten
from stages.contract import Chance, Combine


class PairSettings(Settings):
    """Of methods that go from one seed to another."""

    t: float | None = Field(None, ge=0, le=1)
    """Where between the two seeds, 0 to 1; a fraction of the way as the method measures it. Not set: drawn
    uniformly for each candidate."""
    points: int | None = Field(None, ge=1)
    """So many candidates share each pair, at evenly spaced inner points: t = 1/(n+1), …, n/(n+1). Not set:
    each candidate draws its own pair."""

    @model_validator(mode="after")
    def _one_place(self) -> PairSettings:
        if self.t is not None and self.points is not None:
            raise PydanticCustomError(
                "said",
                "t = {t} and points = {points} both say where between the seeds; set one of them",
                {"t": self.t, "points": self.points},
            )
        return self


class PaceSettings(PairSettings):
    """Of methods that reach all points of the way, but not at SLERP's pace."""

    pace: Literal["own", "angle"] = "own"
    """What t measures. own: the method's own weights, 1 − t and t; angle: SLERP's, so that the result has the
    direction of SLERP's at t (a control: what is left of the difference is the norm)."""


class GroupSettings(Settings):
    """Of methods that find the middle of a group of seeds."""

    group: int = Field(3, ge=2)
    """Seeds in a centroid; the papers use 3, 5, 10 and 25."""
    weights: Literal["equal", "dirichlet"] = "equal"
    """Weights of the seeds: equal as in the papers, or uniform on the simplex, because K of N seeds have only
    N-over-K centroids, each one image."""
    whiten: bool = False
    """Make the seeds uncorrelated first (see `stages.combine.whiten`)."""


def refuse_idle(settings: Settings, mode: str, used: Mapping[str, tuple[str, ...]]) -> None:
    """Raise for a setting that is not the default and that only other modes use.

    `used` has for each mode the settings that not all modes have.
    """
    for name in dict.fromkeys(name for names in used.values() for name in names):
        value = getattr(settings, name)
        if name not in used[mode] and value != type(settings).model_fields[name].default:
            raise PydanticCustomError(
                "said",
                "{name} = {value} does nothing in mode {mode}; leave it out, or set mode: {modes}",
                {
                    "name": name,
                    "value": value,
                    "mode": mode,
                    "modes": " or ".join(m for m, names in used.items() if name in names),
                },
            )


def pair(chance: Chance, seeds: int, t: float | None, points: int | None) -> Combination:
    """Two distinct seeds, and the weights (1 − t, t)."""
    rng = chance.own() if points is None else chance.shared("pair", chance.index // points)
    first, second = sorted(int(i) for i in rng.choice(seeds, size=2, replace=False))
    return Combination((first, second), place(chance, rng, t, points))


def place(
    chance: Chance, rng: np.random.Generator, t: float | None, points: int | None
) -> tuple[float, float]:
    """(1 − t, t): as given, one of the evenly spaced points, or drawn."""
    if t is None:
        t = float(rng.random()) if points is None else (chance.index % points + 1) / (points + 1)
    return 1 - t, t


def group(chance: Chance, seeds: int, size: int, weights: str) -> Combination:
    """`size` distinct seeds, and their weights, which sum to 1."""
    rng = chance.own()
    parents = members(rng, seeds, size)
    if weights == "equal":
        return Combination(parents, (1 / size,) * size)
    return Combination(parents, tuple(float(w) for w in rng.dirichlet(np.ones(size))))


def members(rng: np.random.Generator, seeds: int, size: int) -> tuple[int, ...]:
    """`size` distinct seeds, in their order."""
    return tuple(sorted(int(i) for i in rng.choice(seeds, size=size, replace=False)))


class PairMethod(Combine):
    """A method that goes from one seed to another: what it adds is the way."""

    def seeds_needed(self) -> int:
        return 2

    def draw(self, chance: Chance, seeds: int) -> Combination:
        return pair(chance, seeds, self.config.t, self.config.points)

    @abstractmethod
    def between(
        self, z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float
    ) -> Float[Tensor, "C H W"]:
        """The point at t of the way from one seed to the other."""

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        return self.between(z_KCHW[0], z_KCHW[1], weights[1])


class GroupMethod(Combine):
    """A method that finds the middle of a group: what it adds is the middle."""

    def seeds_needed(self) -> int:
        return self.config.group

    def draw(self, chance: Chance, seeds: int) -> Combination:
        return group(chance, seeds, self.config.group, self.config.weights)

    @abstractmethod
    def middle(self, z_KCHW: Float[Tensor, "K C H W"], w_K: Float[Tensor, " K"]) -> Float[Tensor, "C H W"]:
        """The middle of the seeds, each with its weight."""

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        w_K = torch.tensor(weights, dtype=torch.float64, device=z_KCHW.device)
        return self.middle(whiten(z_KCHW) if self.config.whiten else z_KCHW, w_K)
