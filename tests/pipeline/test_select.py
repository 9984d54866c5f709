"""Selection, checked against a search that looks at one candidate after another."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipeline.select import FAILED, PASSED, Selection, Stream, slots, stream_quotas

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


@st.composite
def worlds(draw):
    """A stream, and what each of its candidates would turn out to be."""
    size, units = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    outcome = st.sampled_from([PASSED, PASSED, FAILED, "clip.margin", "classifier.probability"])
    outcomes = draw(st.lists(st.lists(outcome, min_size=size, max_size=size), min_size=units, max_size=units))
    return Stream(draw(st.integers(0, 12)), units, size), outcomes


def one_by_one(stream: Stream, outcomes: list[list[str]]) -> tuple[list[tuple[int, int]], int]:
    """The accepted candidates and the number of units looked at, the slow and obvious way."""
    accepted: list[tuple[int, int]] = []
    for unit in range(stream.max_units):
        if len(accepted) == stream.quota:
            return accepted, unit
        passed = [(unit, place) for place, outcome in enumerate(outcomes[unit]) if outcome == PASSED]
        accepted += passed[: stream.quota - len(accepted)]
    return accepted, stream.max_units


def complete(stream: Stream, outcomes: list[list[str]]) -> set[int]:
    """Run what is needed until nothing is; the units that were run."""
    run: set[int] = set()
    while needed := stream.needed():
        assert not run & set(needed)  # no unit twice
        for unit in needed:
            stream.outcomes[unit] = outcomes[unit]
        run |= set(needed)
    return run


@given(worlds())
def test_exactly_the_units_of_a_one_by_one_search_are_run(world):
    stream, outcomes = world
    accepted, units = one_by_one(stream, outcomes)
    assert complete(stream, outcomes) == set(range(units))
    selection = stream.select()
    assert selection.final
    assert (list(selection.accepted), selection.units) == (accepted, units)


@given(worlds(), st.data())
def test_every_needed_unit_is_needed_whatever_the_others_hold(world, data):
    stream, outcomes = world
    known = data.draw(st.sets(st.integers(0, max(stream.max_units - 1, 0)), max_size=stream.max_units))
    stream.outcomes = {unit: outcomes[unit] for unit in known if unit < stream.max_units}
    looked_at = one_by_one(stream, outcomes)[1]
    needed = stream.needed()
    assert all(unit < looked_at and unit not in stream.outcomes for unit in needed)
    assert needed == sorted(set(needed))
    assert bool(needed) == bool(set(range(looked_at)) - stream.outcomes.keys())


@given(worlds())
def test_the_account_closes(world):
    stream, outcomes = world
    complete(stream, outcomes)
    s = stream.select()
    assert s.candidates == len(s.accepted) + sum(s.rejected.values()) + s.surplus + s.failed
    assert s.candidates == s.units * stream.unit_size
    assert stream.quota == len(s.accepted) + s.missing
    assert s.exhausted == (s.missing > 0)
    assert len(set(s.accepted)) == len(s.accepted)
    assert all(outcomes[unit][place] == PASSED for unit, place in s.accepted)


@given(worlds(), st.randoms(use_true_random=False))
def test_the_order_of_completion_does_not_matter(world, random):
    stream, outcomes = world
    complete(stream, outcomes)
    other = Stream(stream.quota, stream.max_units, stream.unit_size)
    for unit in random.sample(sorted(stream.outcomes), len(stream.outcomes)):
        other.outcomes[unit] = outcomes[unit]
    assert other.select() == stream.select()


@given(worlds())
def test_what_lies_beyond_the_cut_changes_nothing(world):
    stream, outcomes = world
    complete(stream, outcomes)
    everything = Stream(stream.quota, stream.max_units, stream.unit_size, dict(enumerate(outcomes)))
    everything.outcomes[stream.max_units] = [PASSED] * stream.unit_size  # left by a build with more attempts
    assert everything.needed() == []
    assert everything.select() == stream.select()


def finished(stream: Stream, outcomes: list[list[str]]) -> Selection:
    complete(stream, outcomes)
    return stream.select()


@given(worlds())
def test_loosening_never_asks_for_more_and_never_delivers_less(world):
    stream, outcomes = world
    loose = [[PASSED if o == "clip.margin" else o for o in unit] for unit in outcomes]
    before = finished(stream, outcomes)
    after = finished(Stream(stream.quota, stream.max_units, stream.unit_size), loose)
    assert after.units <= before.units
    assert len(after.accepted) >= len(before.accepted)
    assert after.missing <= before.missing


@given(worlds(), st.integers(1, 5))
def test_a_larger_quota_keeps_what_was_accepted(world, more):
    stream, outcomes = world
    before = finished(stream, outcomes)
    after = finished(Stream(stream.quota + more, stream.max_units, stream.unit_size), outcomes)
    assert after.accepted[: len(before.accepted)] == before.accepted


def test_an_unknown_unit_leaves_a_selection_open():
    stream = Stream(quota=3, max_units=4, unit_size=2, outcomes={1: [PASSED, FAILED]})
    selection = stream.select()
    assert not selection.final
    assert selection.unknown == (0, 2, 3)
    assert not selection.exhausted  # there is still hope
    assert stream.needed() == [0]  # units 0 and 1 may hold all three


@given(
    shares=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), quota=st.integers(0, 200)
)
def test_quotas_are_the_counts_of_the_slots(shares, quota):
    order = slots(shares, quota)
    assert stream_quotas(shares, quota) == {name: order.count(name) for name in shares}


def test_quotas_of_a_billion_images_take_no_time():
    assert stream_quotas({"a": 0.75, "b": 0.25}, 10**9) == {"a": 750_000_000, "b": 250_000_000}
