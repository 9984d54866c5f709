"""What the driver makes of receipts and deaths; no worker is needed to tell."""

from __future__ import annotations

import pytest

from pipeline.config import load
from pipeline.phases import MAX_DISSECTIONS, MAX_SUSPICIONS, Inversions, Units
from pipeline.plan import make_plan
from pipeline.references import Lock
from pipeline.select import Stream
from pipeline.tasks import Done, InvertTask, ProbeTask, Suspects, UnitReceipt, UnitTask
from pipeline.telemetry import JsonLines
from schemas.records import Reference
from tests.small_build import make_config, noise_recipe

UNIT = 4


@pytest.fixture
def units(tmp_path) -> Units:
    """One stream of one class that needs two units of four."""
    path = make_config(
        tmp_path, recipes={"noise": noise_recipe(unit=UNIT)}, filter=[],
        targets=[{"classes": ["circle"], "accepted": 8, "attempts": 2}],
    )  # fmt: skip
    plan = make_plan(load(path), Lock())
    streams = {s.id: Stream(s.quota, s.max_units, s.unit) for s in plan.streams}
    telemetry = JsonLines()
    telemetry.phase("generate", 2)
    return Units(plan, streams, lambda *learned: None, telemetry)


def take(units: Units) -> list:
    """Every task that can be started now."""
    return list(iter(units.next, None))


def probe(units: Units, task: UnitTask, deadly: set[int]) -> UnitTask:
    """A unit has ended its worker, and so do some of its candidates; what is to be run then."""
    units.killed(task)
    probes = take(units)
    assert [p.index for p in probes] == list(range(task.unit * UNIT, (task.unit + 1) * UNIT))
    assert all(isinstance(p, ProbeTask) for p in probes)
    for p in reversed(probes):
        assert not take(units)
        units.killed(p) if p.index in deadly else units.done(p, Done(1))
    (again,) = take(units)
    return again


def test_units_are_asked_for_as_selection_needs_them(units):
    first, second = take(units)
    assert (first.unit, second.unit) == (0, 1)
    units.done(first, UnitReceipt(("passed", "r", "r", "failed"), "{}", True, 1.0, 100))
    units.done(second, UnitReceipt(("passed",) * 4, "{}", True, 1.0, 100))
    (third,) = take(units)
    assert third.unit == 2
    assert (units.generated, units.generated_bytes, units.busy_seconds) == (2, 200, 2.0)


def test_a_unit_with_suspects_is_run_again_and_told_of_them(units):
    first, _ = take(units)
    units.done(first, Suspects({2: "ValueError: x"}))
    (again,) = take(units)
    assert (again.unit, dict(again.suspects)) == (0, {2: "ValueError: x"})


def test_another_error_each_time_is_nobodys_fault(units):
    task, _ = take(units)
    for n in range(MAX_SUSPICIONS - 1):
        units.done(task, Suspects({2: f"ValueError: {n}"}))
        (task,) = take(units)
    with pytest.raises(RuntimeError, match="raises another error each time"):
        units.done(task, Suspects({2: "ValueError: other"}))


def test_a_candidate_that_dies_alone_is_a_killer(units):
    task = take(units)[1]
    again = probe(units, task, deadly={5})
    assert (again.unit, set(again.killers)) == (1, {5})
    assert "died" in again.killers[5]


def test_a_unit_that_dies_without_a_killer_is_given_up(units):
    task = take(units)[0]
    for _ in range(MAX_DISSECTIONS):
        task = probe(units, task, deadly=set())
        assert not task.killers
    with pytest.raises(RuntimeError, match="none of its candidates alone does"):
        units.killed(task)


def test_a_unit_in_which_every_candidate_dies_is_not_believed(units):
    with pytest.raises(RuntimeError, match="every candidate of circle / noise ends its worker"):
        probe(units, take(units)[0], deadly=set(range(UNIT)))


def test_a_batch_of_references_that_ends_workers_is_taken_apart_and_the_one_at_fault_refused():
    images = tuple(Reference(str(n), "circle", f"circle/{n}.png", 64, 64) for n in range(3))
    received = []
    work = Inversions([InvertTask("s", images)], lambda task, receipt: received.append(task))
    work.killed(work.next())
    alone = [work.next() for _ in images]
    assert [task.references for task in alone] == [(image,) for image in images]
    assert work.next() is None
    work.killed(alone[1])  # the runner says so after two deaths
    for task in (alone[0], alone[2]):
        work.done(task, Done(1))
    again = work.next()
    assert again.references == (images[1],)
    assert "died while it inverted this image alone" in again.killer
    work.done(again, Done(1))
    assert len(received) == 3
    assert work.next() is None
