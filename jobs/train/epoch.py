"""The plan of an epoch: which images, in which order, on which rank. Pure functions, without I/O.

What an epoch holds. Every synthetic image once; of the real images of a class as many as make up its share p,
n·p / (1 - p) beside n synthetic ones, to the nearest whole number. They take turns, over epochs too: over the
first k epochs no two of a class differ by more than one showing.

In which order. Shards in a random order and the real images anywhere between them; that sequence is cut into
one contiguous piece for each rank, so that a rank reads few shards; and within its piece a window of so many
images is shuffled after the other, so that few shards are open at a time. The order depends on the seed, the
epoch and the number of ranks, not on the workers of a DataLoader.

Letters: N images, C classes, D images drawn for an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int

from schemas.ids import random_stream

REAL = -1  # in place of the number of a shard
Last = Literal["wrap", "drop"]


@dataclass(frozen=True)
class Mixture:
    """The images there are, and the share of real ones that is asked for."""

    label_N: Int[np.ndarray, " N"]  # class index
    shard_N: Int[np.ndarray, " N"]  # or REAL
    classes: int
    shares: Mapping[int, float] = field(default_factory=dict)  # of real images; else each of them once

    @cached_property
    def synthetic_C(self) -> Int[np.ndarray, " C"]:
        """How many synthetic images of each class an epoch has: all, or none where the share is 1."""
        there_C, real_C = self._there(real=False), self._there(real=True)
        none = [c for c, share in self.shares.items() if share == 1 and real_C[c]]
        there_C[none] = 0
        return there_C

    @cached_property
    def real_C(self) -> Int[np.ndarray, " C"]:
        """How many real images of each class an epoch has, repetitions counted.

        A class without synthetic images has each of its real ones once, unless its share is 0.
        """
        synthetic_C, real_C = self._there(real=False), self._there(real=True)
        for c, share in self.shares.items():
            if share == 0:
                real_C[c] = 0
            elif share < 1 and synthetic_C[c] and real_C[c]:
                real_C[c] = round(synthetic_C[c] * share / (1 - share))
        return real_C

    @property
    def size(self) -> int:
        """D."""
        return int(self.synthetic_C.sum() + self.real_C.sum())

    def _there(self, real: bool) -> Int[np.ndarray, " C"]:
        return np.bincount(self.label_N[(self.shard_N == REAL) == real], minlength=self.classes)

    def synthetic(self) -> Int[np.ndarray, " D"]:
        """The synthetic images of every epoch."""
        return np.flatnonzero((self.shard_N != REAL) & (self.synthetic_C > 0)[self.label_N])

    def real(self, rng_seed: int, epoch: int) -> Int[np.ndarray, " D"]:
        """The real images of an epoch, repetitions counted, class by class."""
        rows = np.flatnonzero(self.shard_N == REAL)
        rows = rows[np.argsort(self.label_N[rows], kind="stable")]
        ends = np.cumsum(self._there(real=True))
        drawn = [np.empty(0, np.int64)]
        for c in np.flatnonzero(self.real_C):
            own = rows[(ends[c - 1] if c else 0) : ends[c]]
            drawn.append(own[_turns(len(own), int(self.real_C[c]), epoch, rng_seed, int(c))])
        return np.concatenate(drawn)


def _turns(there: int, wanted: int, epoch: int, *identity: int) -> Int[np.ndarray, " D"]:
    """Places [epoch·wanted, (epoch+1)·wanted) of a sequence of permutations of `there` images."""
    if there == wanted:
        return np.arange(there)
    first = epoch * wanted
    rounds = range(first // there, (first + wanted - 1) // there + 1)
    orders = [random_stream("real", *identity, number).permutation(there) for number in rounds]
    start = first - rounds[0] * there
    return np.concatenate(orders)[start : start + wanted]


def length(size: int, ranks: int, batch: int, last: Last) -> int:
    """How many images an epoch of `size` has on each rank; 0 when there is not a batch for each.

    `wrap` fills up with the first images of the epoch, fewer than there are ranks; `drop` leaves out what
    does not make a whole batch on every rank.
    """
    return -(-size // ranks) if last == "wrap" else size // (ranks * batch) * batch


def order(
    mixture: Mixture, *, rng_seed: int, epoch: int, rank: int, ranks: int, each: int, window: int
) -> Int[np.ndarray, " D"]:
    """The `each` images of a rank in an epoch, as rows of the mixture, in their order."""
    chance = random_stream("epoch", rng_seed, epoch)
    rows = mixture.synthetic()
    place_S = chance.permutation(int(mixture.shard_N.max(initial=REAL)) + 1)
    rows = rows[np.lexsort((chance.random(len(rows)), place_S[mixture.shard_N[rows]]))]
    real = chance.permutation(mixture.real(rng_seed, epoch))
    rows = np.insert(rows, chance.integers(0, len(rows) + 1, len(real)), real)
    own = np.take(rows, np.arange(rank * each, (rank + 1) * each), mode="wrap")
    shuffle = random_stream("window", rng_seed, epoch, rank).permutation
    return np.concatenate([shuffle(own[start : start + window]) for start in range(0, each, window)])
