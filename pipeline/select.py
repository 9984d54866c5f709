"""Selection: which candidates are in the dataset. Pure, total, and blind to the order of completion.

A stream is the candidates of one (target, recipe). Its units are looked at in order until the stream's part
of the quota is filled or its attempts are used up; what lies beyond that unit does not belong to the build,
even if an earlier build with a larger quota left it in the store. So a build's content depends on its config
alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

PASSED = "passed"
FAILED = "failed"
# Any other outcome of a candidate is the rule that rejected it, such as "clip.margin".


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


@dataclass(frozen=True)
class Selection:
    """What a stream contributes, and an account of each candidate that was looked at."""

    accepted: tuple[tuple[int, int], ...]  # (unit, place in the unit), in candidate order
    units: int  # units looked at: 0 … units - 1
    candidates: int
    rejected: Mapping[str, int]  # rule → count
    surplus: int
    failed: int
    missing: int  # accepted images still owed
    exhausted: bool  # owed, and no attempts are left
    unknown: tuple[int, ...] = ()  # units that must be known before this is final

    @property
    def final(self) -> bool:
        return not self.unknown


@dataclass
class Stream:
    """The state of one stream: its quota, its cap, and the outcomes that are known so far."""

    quota: int
    max_units: int
    unit_size: int
    outcomes: dict[int, Sequence[str]] = field(default_factory=dict)

    def needed(self) -> list[int]:
        """The unknown units that selection will look at whatever they hold, in order.

        An unknown unit may fill `unit_size` places, so the units up to the point where the quota would be
        filled in this best case are needed for certain. Running them, and asking again, generates exactly
        the units that a one-by-one search would: no unit is made in vain.
        """
        owed, units = self.quota, []
        for unit in range(self.max_units):
            if owed <= 0:
                break
            known = self.outcomes.get(unit)
            if known is None:
                units.append(unit)
                owed -= self.unit_size
            else:
                owed -= sum(outcome == PASSED for outcome in known)
        return units

    def select(self) -> Selection:
        """Verdicts in candidate order; unknown units are passed over and reported."""
        accepted: list[tuple[int, int]] = []
        rejected: Counter[str] = Counter()
        surplus = failed = candidates = 0
        unknown = []
        unit = 0
        while unit < self.max_units and len(accepted) < self.quota:
            outcomes = self.outcomes.get(unit)
            if outcomes is None:
                unknown.append(unit)
            for place, outcome in enumerate(outcomes or ()):
                candidates += 1
                if outcome == FAILED:
                    failed += 1
                elif outcome != PASSED:
                    rejected[outcome] += 1
                elif len(accepted) < self.quota:
                    accepted.append((unit, place))
                else:
                    surplus += 1
            unit += 1
        missing = self.quota - len(accepted)
        return Selection(
            accepted=tuple(accepted),
            units=unit,
            candidates=candidates,
            rejected=dict(sorted(rejected.items())),
            surplus=surplus,
            failed=failed,
            missing=missing,
            exhausted=missing > 0 and not unknown,
            unknown=tuple(unknown),
        )
