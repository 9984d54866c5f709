"""Duplicates, checked against a search that looks at one accepted slot after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import parse
from pipeline.distinct import distincts, make_streams, tell
from pipeline.plan import make_plan
from pipeline.references import Lock
from pipeline.select import FAILED, PASSED, Signatures, slots
from tests.small_build import sketch_recipe

DUPLICATE = "duplicates.candidate"
SIZE, UNITS = 2, 4
LOOKS = 6  # different pictures that there are


@cache
def planned(quota: int, shares: tuple[float, ...] = (1, 2), classes: tuple[str, ...] = ("circle",)):
    names = "ab"[: len(shares)]
    config = {
        "output": "memory://nowhere",
        "recipes": {name: sketch_recipe(unit=SIZE, batch=1) for name in names},
        "targets": [
            {
                "classes": list(classes), "accepted": quota, "attempts": 100,
                "recipe": dict(zip(names, shares, strict=True)),
            }
        ],
        "filter": [{"method": "duplicates", "bits": None, "cosine": 0.9}],
    }  # fmt: skip
    return make_plan(parse(config, "test"), Lock())


def streams_of(plan, units=UNITS):
    streams = make_streams(plan)
    for stream in streams.values():
        stream.max_units = units
        stream._look()
    return streams


@dataclass
class World:
    """What each candidate of each stream looks like: a number; -1 failed, -2 rejected by another filter."""

    quota: int
    looks: list[list[int]]  # by stream

    def streams(self):
        return streams_of(planned(self.quota))

    def tell(self, streams, number: int, unit: int) -> None:
        looks = self.looks[number][unit * SIZE : (unit + 1) * SIZE]
        outcomes = [{-1: FAILED, -2: "clip.margin"}.get(look, PASSED) for look in looks]
        found = Signatures(np.zeros(SIZE, np.int64), np.eye(LOOKS, dtype=np.float32)[looks])
        list(streams.values())[number].learn(unit, outcomes, "{}", found)

    def one_by_one(self) -> list[list[int]]:
        """The definition: a slot takes the next candidate of its recipe that no earlier slot looks like."""
        accepted: list[list[int]] = [[], []]
        seen, waiting = set[int](), [list(enumerate(looks)) for looks in self.looks]
        for recipe in slots({"a": 1, "b": 2}, self.quota):
            number = "ab".index(recipe)
            while waiting[number]:
                index, look = waiting[number].pop(0)
                if look >= 0 and look not in seen:
                    seen.add(look)
                    accepted[number].append(index)
                    break
        return accepted


@st.composite
def worlds(draw):
    look = st.integers(-2, LOOKS - 1)
    looks = st.lists(look, min_size=SIZE * UNITS, max_size=SIZE * UNITS)
    return World(draw(st.integers(1, 7)), [draw(looks), draw(looks)])


orders = st.permutations([(number, unit) for number in (0, 1) for unit in range(UNITS)])


def accepted(streams) -> list[list[int]]:
    return [stream.select().accepted.tolist() for stream in streams.values()]


@settings(deadline=None)
@given(worlds(), orders)
def test_any_order_of_receipts_gives_what_one_slot_after_another_gives(world, order):
    streams = world.streams()
    for number, unit in order:
        world.tell(streams, number, unit)
    assert accepted(streams) == world.one_by_one()


@settings(deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_only_needed_units_are_run_and_they_suffice(world, random):
    streams, run = world.streams(), set[tuple[int, int]]()
    while needed := [(n, u) for n, s in enumerate(streams.values()) for u in s.needed()]:
        assert sum(stream.pending for stream in streams.values()) == len(needed)
        assert not run & set(needed)
        number, unit = random.choice(needed)
        world.tell(streams, number, unit)
        run.add((number, unit))
    assert accepted(streams) == world.one_by_one()
    assert all(stream.select().final for stream in streams.values())
    for number, stream in enumerate(streams.values()):
        assert {u for n, u in run if n == number} == set(range(stream.select().units))


@settings(deadline=None)
@given(worlds(), orders, st.data())
def test_what_is_forgotten_and_learned_again_changes_nothing(world, order, data):
    streams = world.streams()
    for number, unit in order:
        world.tell(streams, number, unit)
    lost = order[: data.draw(st.integers(0, len(order)))]
    for number, unit in lost:
        list(streams.values())[number].forget([unit])
    for number, unit in reversed(lost):
        world.tell(streams, number, unit)
    assert accepted(streams) == world.one_by_one()


@given(st.lists(st.integers(0, LOOKS - 1), min_size=8, max_size=8), st.integers(1, 4), st.integers(1, 4))
def test_a_larger_quota_keeps_what_was_accepted(looks, quota, more):
    chosen = []
    for asked in (quota, quota + more):
        streams = streams_of(planned(asked, (1,)))
        for unit in range(UNITS):
            World(asked, [looks]).tell(streams, 0, unit)
        chosen.append(accepted(streams)[0])
    assert chosen[1][: len(chosen[0])] == chosen[0]


def test_a_duplicate_names_the_other():
    plan = planned(3, (1,))
    streams = streams_of(plan)
    for unit in range(UNITS):
        World(3, [[0, 0, 1, 2, 3, 4, 5, 5]]).tell(streams, 0, unit)
    (stream,) = plan.streams
    (distinct,) = distincts(streams)
    assert list(distinct.verdicts) == [(stream.id, 1)]
    verdict = distinct.verdicts[stream.id, 1]
    assert (verdict.passed, verdict.rule, verdict.score, verdict.threshold) == (False, DUPLICATE, 1, 0.9)
    assert verdict.reason.endswith(f"to {stream.key(0)}")
    assert streams[stream.id].select().rejected == {DUPLICATE: 1}


def test_other_targets_are_told_and_keep_theirs():
    plan = planned(2, (1,), ("circle", "gear"))
    streams = streams_of(plan, 1)
    world = World(2, [[0, 1], [2, 1]])
    for number in (0, 1):
        world.tell(streams, number, 0)
    assert accepted(streams) == [[0, 1], [0, 1]]
    told = tell(plan, streams, {name: s.select() for name, s in streams.items()})
    circle, gear = plan.streams
    assert told.rejected == {}
    assert [pair[:2] for pair in told.across] == [(gear.key(1), circle.key(1))]
    assert told.pairs == 1


def test_features_that_are_not_finite_are_rejected():
    plan = planned(2, (1,))
    streams = streams_of(plan)
    embedding = np.array([[np.nan, 0], [1, 0]], np.float32)
    found = Signatures(np.zeros(2, np.int64), embedding)
    next(iter(streams.values())).learn(0, [PASSED, PASSED], "{}", found)
    assert accepted(streams) == [[1]]


def test_a_stream_wants_its_references_first():
    (distinct,) = distincts(make_streams(planned(2, (1,))))
    distinct.ready = False
    with pytest.raises(AssertionError, match="the references come first"):
        distinct.with_references(next(iter(distinct.plans)), 0, [PASSED] * SIZE, None)
