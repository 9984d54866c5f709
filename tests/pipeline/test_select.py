"""Selection, checked against a search that looks at one candidate after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.select import FAILED, PASSED, Stream, slots, stream_quotas
from pipeline.telemetry import Tally
from schemas.errors import UserError

shares = st.dictionaries(
    st.sampled_from("abcdef"), st.integers(1, 20) | st.floats(0.01, 1), min_size=1, max_size=6
)


@given(shares, st.integers(0, 60), st.integers(0, 20))
def test_a_larger_quota_only_adds_slots(weights, quota, more):
    assert slots(weights, quota + more)[:quota] == slots(weights, quota)


@given(shares, st.integers(0, 200))
def test_shares_hold_within_one_image_at_every_quota(weights, quota):
    counts: Counter[str] = Counter()
    total = sum(weights.values())
    for number, name in enumerate(slots(weights, quota), start=1):
        counts[name] += 1
        for recipe, weight in weights.items():
            assert abs(counts[recipe] - number * weight / total) < 1 + 1e-9


@given(shares, st.integers(0, 60))
def test_quotas_are_given_out_whole_and_in_any_order_of_the_recipes(weights, quota):
    quotas = stream_quotas(weights, quota)
    assert sum(quotas.values()) == quota
    assert quotas.keys() == weights.keys()
    assert stream_quotas(dict(reversed(weights.items())), quota) == quotas


def test_equal_shares_take_turns():
    assert slots({"b": 0.5, "a": 0.5}, 5) == ["a", "b", "a", "b", "a"]
    assert slots({"a": 0.1, "b": 0.2}, 6) == slots({"a": 1, "b": 2}, 6)
    assert slots({"a": 0.1, "b": 0.3}, 40) == slots({"a": 1, "b": 3}, 40)  # 0.3 is not 3 times 0.1 in binary


@dataclass
class World:
    """A stream, and what each of its candidates would turn out to be."""

    quota: int
    size: int  # of a unit
    outcomes: list[list[str]]  # of each unit up to the cap

    def stream(self, *known: int) -> Stream:
        stream = Stream(self.quota, len(self.outcomes), self.size)
        for unit in known:
            self.tell(stream, unit)
        return stream

    def tell(self, stream: Stream, unit: int) -> None:
        stream.learn(unit, self.outcomes[unit], f"machine {unit % 2}")

    def complete(self) -> tuple[Stream, set[int]]:
        """Run what is needed until nothing is; the units that were run."""
        stream, run = self.stream(), set[int]()
        while needed := list(stream.needed()):
            assert not run & set(needed)  # no unit twice
            for unit in needed:
                self.tell(stream, unit)
            run |= set(needed)
        return stream, run


@st.composite
def worlds(draw):
    size, units = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    outcome = st.sampled_from([PASSED, PASSED, FAILED, "clip.margin", "classifier.probability"])
    outcomes = draw(st.lists(st.lists(outcome, min_size=size, max_size=size), min_size=units, max_size=units))
    return World(draw(st.integers(0, 12)), size, outcomes)


@st.composite
def half_known(draw):
    """A world, and some of its units in an order of completion."""
    world = draw(worlds())
    units = draw(st.permutations(range(len(world.outcomes))))
    return world, units[: draw(st.integers(0, len(units)))]


def one_by_one(world: World, known: Iterable[int] | None = None) -> dict[str, Any]:
    """The definition of selection: look at one candidate after another; unknown units are passed over."""
    known = range(len(world.outcomes)) if known is None else known
    accepted: list[int] = []
    seen: Counter[str] = Counter()
    units, unknown, certain = 0, 0, 0
    for unit, outcomes in enumerate(world.outcomes):
        if len(accepted) == world.quota:
            break
        units += 1
        if unit not in known:
            unknown += 1
            continue
        for place, outcome in enumerate(outcomes):
            surplus = outcome == PASSED and len(accepted) == world.quota
            seen["surplus" if surplus else outcome] += 1
            if outcome == PASSED and not surplus:
                accepted.append(unit * world.size + place)
        certain = certain if unknown else len(accepted)
    missing = world.quota - len(accepted)
    return {
        "accepted": accepted,
        "units": units,
        "candidates": sum(seen.values()),
        "rejected": {rule: seen[rule] for rule in ("classifier.probability", "clip.margin") if seen[rule]},
        "surplus": seen["surplus"],
        "failed": seen[FAILED],
        "missing": missing,
        "exhausted": missing > 0 and not unknown,
        "environments": {f"machine {unit % 2}" for unit in range(units) if unit in known},
        "unknown": unknown,
        "certain": certain,
    }


def needed(world: World, known: Iterable[int]) -> list[int]:
    """The definition of what is needed: unknown units while the quota would not be full at their best."""
    owed, units = world.quota, []
    for unit, outcomes in enumerate(world.outcomes):
        if owed <= 0:
            break
        if unit in known:
            owed -= outcomes.count(PASSED)
        else:
            units.append(unit)
            owed -= world.size
    return units


def facts(stream: Stream) -> dict[str, Any]:
    selection = stream.select()
    return vars(selection) | {"accepted": selection.accepted.tolist()}


@given(half_known())
def test_after_every_receipt_all_is_as_the_definitions_say(case):
    world, order = case
    stream = world.stream()
    for number, unit in enumerate([None, *order]):
        known = order[:number]
        if unit is not None:
            world.tell(stream, unit)
        expected = one_by_one(world, known)
        assert facts(stream) == expected
        tally = Tally(
            world.quota, len(expected["accepted"]), sum(expected["rejected"].values()), expected["failed"]
        )
        assert stream.tally() == tally
        assert list(stream.needed()) == needed(world, known)
        assert stream.pending == len(needed(world, known))
        assert list(stream.needed(2)) == [u for u in needed(world, known) if u >= 2]
        assert stream.units().tolist() == sorted(known)


@given(half_known(), st.data())
def test_many_units_at_once_and_units_forgotten_are_as_one_after_another(case, data):
    world, order = case
    lost = order[: data.draw(st.integers(0, len(order)))]
    # another order of the rules than the stream's own; one unit is beyond the cap, and one comes twice
    rules = ["clip.margin", FAILED, "classifier.probability", PASSED, "of no candidate"]
    units = [*order, len(world.outcomes) + 3, *order[:1]]
    numbers = [[rules.index(o) for o in world.outcomes[u]] for u in order]
    numbers += [[0] * world.size, *numbers[:1]]
    stream = world.stream()
    stream.learn_all(
        np.array(units), np.array(numbers).reshape(-1, world.size), rules,
        np.array([u % 2 for u in units]), ["machine 0", "machine 1"],
    )  # fmt: skip
    assert facts(stream) == facts(world.stream(*order))
    stream.forget([*lost, len(world.outcomes) + 3])
    left = [unit for unit in order if unit not in lost]
    for unit in [None, *lost]:
        if unit is not None:
            world.tell(stream, unit)
            left.append(unit)
        assert facts(stream) == facts(world.stream(*left))
        assert (stream.tally(), list(stream.needed())) == (
            world.stream(*left).tally(),
            needed(world, left),
        )


@given(worlds())
def test_exactly_the_units_of_a_one_by_one_search_are_run(world):
    stream, run = world.complete()
    expected = one_by_one(world)
    assert run == set(range(expected["units"]))
    assert stream.select().final
    assert facts(stream) == expected


@given(half_known())
def test_every_needed_unit_is_needed_whatever_the_others_hold(case):
    world, known = case
    looked_at = one_by_one(world)["units"]
    found = list(world.stream(*known).needed())
    assert all(unit < looked_at and unit not in known for unit in found)
    assert bool(found) == bool(set(range(looked_at)) - set(known))


@given(worlds())
def test_the_account_closes(world):
    s = world.complete()[0].select()
    assert s.candidates == len(s.accepted) + sum(s.rejected.values()) + s.surplus + s.failed
    assert s.candidates == s.units * world.size
    assert world.quota == len(s.accepted) + s.missing
    assert s.exhausted == (s.missing > 0)
    assert all(world.outcomes[n // world.size][n % world.size] == PASSED for n in s.accepted)


@given(worlds())
def test_what_lies_beyond_the_cut_changes_nothing(world):
    stream, _ = world.complete()
    everything = world.stream(*range(len(world.outcomes)))
    everything.learn(len(world.outcomes), [PASSED] * world.size, "left by a build with more attempts")
    assert list(everything.needed()) == []
    assert facts(everything) == facts(stream)


@given(worlds())
def test_loosening_never_asks_for_more_and_never_delivers_less(world):
    loose = [[PASSED if o == "clip.margin" else o for o in unit] for unit in world.outcomes]
    before = world.complete()[0].select()
    after = World(world.quota, world.size, loose).complete()[0].select()
    assert after.units <= before.units
    assert len(after.accepted) >= len(before.accepted)
    assert after.missing <= before.missing


@given(worlds(), st.integers(1, 5))
def test_a_larger_quota_keeps_what_was_accepted(world, more):
    before = world.complete()[0].select()
    after = World(world.quota + more, world.size, world.outcomes).complete()[0].select()
    assert after.accepted[: len(before.accepted)].tolist() == before.accepted.tolist()


def test_an_unknown_unit_leaves_a_selection_open():
    stream = World(3, 2, [[], [PASSED, FAILED], [], []]).stream(1)
    selection = stream.select()
    assert not selection.final
    assert (selection.unknown, selection.certain) == (3, 0)
    assert not selection.exhausted  # there is still hope
    assert list(stream.needed()) == [0]  # units 0 and 1 may hold all three


def test_rules_without_end_are_a_mistake_in_their_names():
    stream = Stream(quota=1, max_units=1, unit_size=2**16)
    with pytest.raises(UserError, match="more than 65536 rules, such as 'margin of"):
        stream.learn(0, [f"margin of {place}" for place in range(2**16)], "")


@given(
    shares=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), quota=st.integers(0, 200)
)
def test_quotas_are_the_counts_of_the_slots(shares, quota):
    order = slots(shares, quota)
    assert stream_quotas(shares, quota) == {name: order.count(name) for name in shares}


def test_quotas_of_a_billion_images_take_no_time():
    assert stream_quotas({"a": 0.75, "b": 0.25}, 10**9) == {"a": 750_000_000, "b": 250_000_000}
