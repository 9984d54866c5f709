"""Selection: which candidates are in the dataset. Pure, total, and blind to the order of completion.

A stream is the candidates of one (target, recipe). Its units are looked at in order until the stream's part
of the quota is filled or its attempts are used up; what lies beyond that unit does not belong to the build,
even if an earlier build with a larger quota left it in the store. So a build's content depends on its config
alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pipeline.telemetry import Tally
from schemas.errors import UserError

PASSED = "passed"
FAILED = "failed"
# Any other outcome of a candidate is the rule that rejected it, such as "clip.margin".

_PASSED, _FAILED = 0, 1  # their numbers in every stream
_UNKNOWN = -1
_MOST_NAMES = 2**16


def slots(shares: Mapping[str, float], quota: int) -> list[str]:
    """The recipe of each accepted slot, so that every prefix keeps every share within one image.

    The quota method of Balinski and Young (The quota method of apportionment, 1975): of the recipes that are
    below their share, the one whose next image is due first. A larger quota only adds slots. (Plain
    smooth round-robin can be off by more than one image from four recipes on.) Ties go to the name that
    sorts first; shares are taken as the decimal numbers that a person wrote.
    """
    whole = _whole(shares)
    total, counts, order = sum(whole.values()), dict.fromkeys(whole, 0), []
    for number in range(1, quota + 1):
        due = [name for name in whole if counts[name] * total < number * whole[name]]
        chosen = min(due, key=lambda name: (counts[name] + 1) / whole[name])  # min keeps the first of equals
        counts[chosen] += 1
        order.append(chosen)
    return order


def stream_quotas(shares: Mapping[str, float], quota: int) -> dict[str, int]:
    """How many accepted images each recipe owes; none takes over what another fails to deliver."""
    whole = _whole(shares)
    cycles, rest = divmod(quota, sum(whole.values()))  # after a cycle the shares hold exactly, and it repeats
    counts = Counter(slots(shares, rest))
    return {name: cycles * whole[name] + counts[name] for name in shares}


def _whole(shares: Mapping[str, float]) -> dict[str, int]:
    """The shares as the smallest whole numbers of the same proportions, in the order of the names."""
    exact = {name: Fraction(str(shares[name])) for name in sorted(shares)}
    scale = math.lcm(*(share.denominator for share in exact.values()))
    scaled = {name: int(share * scale) for name, share in exact.items()}
    common = math.gcd(*scaled.values())
    return {name: share // common for name, share in scaled.items()}


@dataclass(frozen=True, eq=False)
class Selection:
    """What a stream contributes, and an account of each candidate that was looked at."""

    accepted: np.ndarray  # the numbers of the candidates, ascending, in four bytes each
    units: int  # units looked at: 0 … units - 1
    candidates: int
    rejected: Mapping[str, int]  # rule → count
    surplus: int
    failed: int
    missing: int  # accepted images still owed
    exhausted: bool  # owed, and no attempts are left
    environments: frozenset[str]  # of the parts of these units
    unknown: int  # units that must be known before this is final
    certain: int  # accepted before the first unknown unit: they stay, whatever that holds

    @property
    def final(self) -> bool:
        return not self.unknown


@dataclass(frozen=True, eq=False)
class Signatures:
    """By what the candidates of a unit are compared. Shape letters: U candidates, E features."""

    hash_U: np.ndarray  # int64
    embedding_UE: np.ndarray  # float32, of unit length; NaN for failed candidates


class _Names:
    """Numbers for a few names, in the order of their first use."""

    def __init__(self, *names: str):
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self.numbers(names)

    def __getitem__(self, number: int) -> str:
        return self._names[number]

    def __len__(self) -> int:
        return len(self._names)

    def numbers(self, names: Iterable[str]) -> np.ndarray:
        for name in (names := list(names)):
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        if len(self) > _MOST_NAMES:
            raise UserError(
                f"a filter rejects by more than {_MOST_NAMES} rules, such as {self._names[-1]!r};"
                " a rule is named after the filter and its threshold, without the score"
            )
        return np.array([self._numbers[name] for name in names], np.uint16)


class Stream:
    """The state of one stream: its quota, its cap, and the outcomes that are known so far.

    A candidate takes two bytes. What changes with every receipt, `needed` and `tally`, is kept up to date, so
    that a receipt costs the same however many came before it; only `select` looks at everything.
    """

    def __init__(self, quota: int, max_units: int, unit_size: int):
        self.quota, self.max_units, self.unit_size = quota, max_units, unit_size
        self._rules, self._environments = _Names(PASSED, FAILED), _Names()
        self._outcomes = np.zeros((0, unit_size), np.uint16)  # numbers of rules, by unit and place
        self._environment = np.zeros(0, np.uint16)  # of the part of each unit
        self._passed = np.zeros(0, np.int32)  # candidates of each unit
        self._cut = self._accepted = 0
        self._look()

    def units(self) -> np.ndarray:
        """The known units, ascending."""
        return np.flatnonzero(self._passed != _UNKNOWN)

    def knows(self, unit: int) -> bool:
        return unit < len(self._passed) and bool(self._passed[unit] != _UNKNOWN)

    def learn(
        self, unit: int, outcomes: Sequence[str], environment: str, signatures: Signatures | None = None
    ) -> None:
        """What a unit holds. One beyond the cap, or known already, changes nothing.

        Signatures are for streams whose candidates are compared with each other (`pipeline.distinct`).
        """
        if unit >= self.max_units or self.knows(unit):
            return
        numbers = self._rules.numbers(outcomes)[None]
        self._keep(np.array([unit]), numbers, self._environments.numbers([environment]))
        if unit < self._horizon:
            self.pending -= 1
            self._owed += self.unit_size - int(self._passed[unit])
            self._extend()
        if unit < self._cut or self._accepted < self.quota:
            self._cut = max(self._cut, unit + 1)
            self._count(unit, 1)
            self._retreat()

    def learn_all(
        self,
        units: np.ndarray,
        outcomes: np.ndarray,
        rules: Sequence[str],
        environment: np.ndarray,
        environments: Sequence[str],
    ) -> None:
        """The same for N units at once: `outcomes` (N, unit_size) and `environment` (N) number the names."""
        new = units < self.max_units
        new[new] = ~self._known(units[new])
        if new.any():
            self._keep(
                units[new],
                self._rules.numbers(rules)[outcomes[new]],
                self._environments.numbers(environments)[environment[new]],
            )
            self._look()

    def forget(self, units: Iterable[int]) -> None:
        """Know nothing of these units any more."""
        lost = np.fromiter(units, np.int64)
        self._passed[lost[lost < len(self._passed)]] = _UNKNOWN
        self._look()

    def passes(self, index: int) -> bool:
        """Whether a candidate of a known unit passed."""
        return bool(self._outcomes[divmod(index, self.unit_size)] == _PASSED)

    def revise(self, outcomes: Mapping[int, str]) -> None:
        """Give candidates of known units another outcome."""
        for index, outcome in outcomes.items():
            place = divmod(index, self.unit_size)
            self._outcomes[place] = self._rules.numbers([outcome])[0]
            self._passed[place[0]] = (self._outcomes[place[0]] == _PASSED).sum()
        self._look()

    def needed(self, start: int = 0) -> Iterator[int]:
        """The unknown units from `start` on that selection will look at whatever they hold, in order.

        An unknown unit may fill `unit_size` places, so the units up to the point where the quota would be
        filled in this best case are needed for certain. Running them, and asking again, generates exactly
        the units that a one-by-one search would: no unit is made in vain. There are `pending` of them in all.
        """
        return (unit for unit in range(start, self._horizon) if not self.knows(unit))

    def tally(self) -> Tally:
        """What `select` would count."""
        accepted = min(self._accepted, self.quota)
        return Tally(self.quota, accepted, self._counted - self._accepted - self._failed, self._failed)

    def select(self) -> Selection:
        """Verdicts in candidate order; unknown units are passed over and reported."""
        units = self._filled(np.where(self._passed == _UNKNOWN, 0, self._passed), self.max_units)
        known = self._passed[:units] != _UNKNOWN
        outcomes, looked_at = self._outcomes[:units], int(known.sum())
        passed = np.flatnonzero((outcomes == _PASSED) & known[:, None])
        accepted = passed[: self.quota].astype(np.uint32)
        counts = np.bincount(outcomes[known].ravel(), minlength=len(self._rules))
        rejected = {self._rules[n]: int(counts[n]) for n in range(_FAILED + 1, len(self._rules)) if counts[n]}
        first_unknown = len(known) if known.all() else int(np.argmin(known))
        missing, unknown = self.quota - len(accepted), units - looked_at
        return Selection(
            accepted=accepted,
            units=units,
            candidates=looked_at * self.unit_size,
            rejected=dict(sorted(rejected.items())),
            surplus=len(passed) - len(accepted),
            failed=int(counts[_FAILED]),
            missing=missing,
            exhausted=missing > 0 and not unknown,
            environments=frozenset(
                self._environments[n] for n in np.unique(self._environment[:units][known])
            ),
            unknown=unknown,
            certain=int(np.searchsorted(accepted, first_unknown * self.unit_size)),
        )

    # --- the outcomes ------------------------------------------------------------------------------------

    def _known(self, units: np.ndarray) -> np.ndarray:
        known = np.zeros(len(units), bool)
        there = units < len(self._passed)
        known[there] = self._passed[units[there]] != _UNKNOWN
        return known

    def _keep(self, units: np.ndarray, outcomes: np.ndarray, environment: np.ndarray) -> None:
        if (size := int(units.max()) + 1) > len(self._passed):
            more = min(max(size, 2 * len(self._passed)), self.max_units) - len(self._passed)
            self._outcomes = np.concatenate([self._outcomes, np.zeros((more, self.unit_size), np.uint16)])
            self._environment = np.concatenate([self._environment, np.zeros(more, np.uint16)])
            self._passed = np.concatenate([self._passed, np.full(more, _UNKNOWN, np.int32)])
        self._outcomes[units] = outcomes
        self._environment[units] = environment
        self._passed[units] = (outcomes == _PASSED).sum(axis=1)

    def _filled(self, passing: np.ndarray, otherwise: int) -> int:
        """How many units fill the quota when so many candidates pass of each; or that all do not."""
        if not self.quota:
            return 0
        units = int(np.searchsorted(np.cumsum(passing), self.quota)) + 1
        return units if units <= len(passing) else otherwise

    # --- what is kept up to date -------------------------------------------------------------------------
    # `_horizon`: needed are the unknown units before it; with all of them at their best, `_owed` would still
    # be missing. `_cut`: the known units before it are counted; while the quota is not filled, all of them.

    def _look(self) -> None:
        """Find horizon and cut anew."""
        known = self._passed != _UNKNOWN
        at_best = np.where(known, self._passed, self.unit_size)
        self._horizon = self._filled(at_best, len(at_best))
        self._owed = self.quota - int(at_best[: self._horizon].sum())
        self.pending = self._horizon - int(known[: self._horizon].sum())
        further = min(-(-max(self._owed, 0) // self.unit_size), self.max_units - self._horizon)
        self._horizon, self.pending = self._horizon + further, self.pending + further
        self._owed -= further * self.unit_size

        self._cut = self._filled(np.where(known, self._passed, 0), len(known))
        counted = self._outcomes[: self._cut][known[: self._cut]]
        self._counted, self._accepted = counted.size, int((counted == _PASSED).sum())
        self._failed = int((counted == _FAILED).sum())

    def _extend(self) -> None:
        while self._owed > 0 and self._horizon < self.max_units:
            known = self.knows(self._horizon)
            self._owed -= int(self._passed[self._horizon]) if known else self.unit_size
            self.pending += not known
            self._horizon += 1

    def _retreat(self) -> None:
        while self._accepted >= self.quota:
            last = self._cut - 1
            known = self.knows(last)
            if known and self._accepted - int(self._passed[last]) < self.quota:
                break
            if known:
                self._count(last, -1)
            self._cut = last

    def _count(self, unit: int, sign: int) -> None:
        self._counted += sign * self.unit_size
        self._accepted += sign * int(self._passed[unit])
        self._failed += sign * int((self._outcomes[unit] == _FAILED).sum())
