"""What a candidate draws: a pair of reference seeds and a point between them, or a group and its weights.

Every method of a kind draws alike, so that builds of two methods which differ in nothing else (and have the
same recipe name) combine the same seeds in the same places: a paired comparison.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from schemas.records import Combination
from schemas.settings import Settings
from stages.contract import Chance


class PairSettings(Settings):
    """Of methods that go from one seed to another."""

    t: float | None = Field(None, ge=0, le=1)
    """Where between the two seeds, 0 to 1; a fraction of the way as the method measures it. Not set: drawn
    uniformly for each candidate."""
    points: int | None = Field(None, ge=1)
    """So many candidates share each pair, at evenly spaced inner points: t = 1/(n+1), …, n/(n+1). Not set:
    each candidate draws its own pair."""


class GroupSettings(Settings):
    """Of methods that find the middle of a group of seeds."""

    group: int = Field(3, ge=2)
    """Seeds in a centroid; the papers use 3, 5, 10 and 25."""
    weights: Literal["equal", "dirichlet"] = "equal"
    """Weights of the seeds: equal as in the papers, or uniform on the simplex, because K of N seeds have only
    N-over-K centroids, each one image."""
    whiten: bool = False
    """Make the group's seeds uncorrelated first (see `stages.combine.whiten`)."""


def pair(chance: Chance, seeds: int, t: float | None, points: int | None) -> Combination:
    """Two distinct seeds, and the weights (1 − t, t)."""
    rng = chance.own() if points is None else chance.shared("pair", chance.index // points)
    first, second = sorted(int(i) for i in rng.choice(seeds, size=2, replace=False))
    if t is None:
        t = float(rng.random()) if points is None else (chance.index % points + 1) / (points + 1)
    return Combination((first, second), (1 - t, t))


def group(chance: Chance, seeds: int, size: int, weights: str) -> Combination:
    """`size` distinct seeds, and their weights, which sum to 1."""
    rng = chance.own()
    parents = tuple(sorted(int(i) for i in rng.choice(seeds, size=size, replace=False)))
    if weights == "equal":
        return Combination(parents, (1 / size,) * size)
    return Combination(parents, tuple(float(w) for w in rng.dirichlet(np.ones(size))))
