"""The phases of a build as work for a runner: what can be started, and what a receipt leads to."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.plan import Plan, StreamPlan
from pipeline.select import FAILED, Stream
from pipeline.tasks import (
    InvertTask,
    ProbeTask,
    Receipt,
    Suspects,
    Task,
    UnitReceipt,
    UnitTask,
)
from pipeline.telemetry import Tally, Telemetry

log = logging.getLogger("seedloom")

# A candidate that raises something else each time is no candidate's fault.
MAX_SUSPICIONS = 4
# Nor is a unit's death, when it dies again without those that die alone.
MAX_DISSECTIONS = 2


class ListWork:
    """Independent tasks, each done once."""

    def __init__(self, tasks: Iterable[Task], received: Callable[[Task, Receipt], None]):
        self._tasks, self._received = iter(tasks), received
        self._again: deque[Task] = deque()

    def next(self) -> Task | None:
        return self._again.popleft() if self._again else next(self._tasks, None)

    def done(self, task: Task, receipt: Receipt) -> None:
        self._received(task, receipt)

    def killed(self, task: Task) -> None:
        raise RuntimeError(f"{type(task).__name__} ends every worker that runs it: {task}")


class Inversions(ListWork):
    """Inverts references; one that ends every worker that inverts it alone is refused."""

    def killed(self, task: Task) -> None:
        assert isinstance(task, InvertTask)
        if len(task.references) > 1:
            self._again.extend(InvertTask(task.stream, (reference,)) for reference in task.references)
        else:
            self._again.append(
                replace(task, killer="the worker process died while it inverted this image alone")
            )


class Units:
    """Generate and score until each stream is final: exactly the units that selection will look at."""

    def __init__(
        self,
        plan: Plan,
        streams: dict[str, Stream],
        learned: Callable[[str, int, Sequence[str], str], None],
        telemetry: Telemetry,
    ):
        """`learned` is told of every new unit: its stream, number, outcomes, and the part's environment."""
        self.plan, self.streams, self._learned = plan, streams, learned
        self.telemetry = telemetry
        self.generated = self.generated_bytes = self._finished = 0
        self.busy_seconds = 0.0
        self.of_stream: dict[str, dict[str, float]] = {}  # stream → units made, and device seconds for them
        self._of_target: dict[str, list[StreamPlan]] = {}
        for stream in plan.streams:
            self._of_target.setdefault(stream.target, []).append(stream)
        self._start()
        self._again: deque[Task] = deque()
        self._suspicions: Counter[tuple[str, int]] = Counter()
        self._dissections: Counter[tuple[str, int]] = Counter()
        self._probes: dict[tuple[str, int], dict[int, str | None]] = {}  # candidate → how it ended
        self._probing: dict[tuple[str, int], set[int]] = {}  # candidates that are still to end

    def _start(self) -> None:
        self._next = dict.fromkeys(self.streams, 0)  # stream → the first unit that was not asked for
        self._turn = deque(self.streams)  # streams that may have units to be asked for
        self._idle: set[str] = set()  # and those that have none until a receipt comes
        self._remaining = sum(stream.pending for stream in self.streams.values())

    def remaining(self) -> int:
        """Units that are needed as far as is known."""
        return self._remaining

    def forget(self, units: Iterable[tuple[str, int]]) -> None:
        """Ask for these once more. Only between two runs."""
        for stream, unit in units:
            self.streams[stream].forget([unit])
        self._start()

    def next(self) -> Task | None:
        if self._again:
            return self._again.popleft()
        while self._turn:
            name = self._turn.popleft()
            if (unit := next(self.streams[name].needed(self._next[name]), None)) is not None:
                self._next[name] = unit + 1
                self._turn.append(name)  # every target moves on, none waits for another to end
                return UnitTask(name, unit)
            self._idle.add(name)
        return None

    def done(self, task: Task, receipt: Receipt) -> None:
        if isinstance(task, ProbeTask):
            self._probed(task, None)
            return
        assert isinstance(task, UnitTask)
        if isinstance(receipt, Suspects):
            self._suspicions[task.stream, task.unit] += 1
            if self._suspicions[task.stream, task.unit] >= MAX_SUSPICIONS:
                raise RuntimeError(
                    f"unit {task.unit} of {self.plan.by_id[task.stream].name} raises another error each time:"
                    f" {dict(receipt.raised)}"
                )
            self._say("raised", task, receipt.raised, errors=dict(receipt.raised))
            self._again.append(UnitTask(task.stream, task.unit, dict(receipt.raised), task.killers))
            return
        assert isinstance(receipt, UnitReceipt)
        if FAILED in receipt.outcomes:
            first = task.unit * len(receipt.outcomes)
            self._say("failed", task, [first + i for i, o in enumerate(receipt.outcomes) if o == FAILED])
        target = self.plan.by_id[task.stream].target
        # where candidates are compared with each other, what one stream holds decides on others of its target
        related = [plan.id for plan in self._of_target[target]]
        before = sum(self.streams[name].pending for name in related)
        learned = (task.unit, receipt.outcomes, receipt.environment)
        self.streams[task.stream].learn(*learned, receipt.signatures)
        self._learned(task.stream, *learned)
        self._remaining += sum(self.streams[name].pending for name in related) - before
        for name in related:
            if name in self._idle:
                self._idle.remove(name)
                self._turn.append(name)
        self.generated += receipt.generated
        self.generated_bytes += receipt.bytes
        self.busy_seconds += receipt.seconds
        if receipt.generated:
            made = self.of_stream.setdefault(task.stream, {"units": 0, "seconds": 0.0})
            made["units"] += 1
            made["seconds"] += receipt.seconds
        self.telemetry.tallies(tallies(self._of_target[target], self.streams))
        self._finished += 1
        self.telemetry.advance(1, self._finished + self.remaining())

    def killed(self, task: Task) -> None:
        """A unit that ends workers is taken apart; a candidate that does so alone is a failed one."""
        if isinstance(task, ProbeTask):
            self._probed(task, "the worker process died while it ran this candidate alone")
            return
        assert isinstance(task, UnitTask)
        unit = self.plan.by_id[task.stream].name, task.unit
        self._dissections[unit] += 1
        if self._dissections[unit] > MAX_DISSECTIONS:
            raise RuntimeError(
                f"unit {unit[1]} of {unit[0]} ends its worker, though none of its candidates alone does"
            )
        size = self.plan.by_id[task.stream].unit
        indices = range(task.unit * size, (task.unit + 1) * size)
        self._say("ended their worker, one of them: each is tried alone", task, indices)
        self._probes[task.stream, task.unit] = dict.fromkeys(indices)
        self._again.extend(ProbeTask(task.stream, task.unit, i) for i in indices)
        self._probing[task.stream, task.unit] = set(indices)

    def _say(self, what: str, task: UnitTask, indices: Iterable[int], **facts: Any) -> None:
        """Log what became of candidates."""
        plan = self.plan.by_id[task.stream]
        log.debug(
            f"unit {task.unit} of {plan.name}: candidates {what}",
            extra={
                "facts": {
                    "build": self.plan.build_id,
                    "stream": task.stream,
                    "unit": task.unit,
                    "candidates": [plan.key(index) for index in indices],
                    **facts,
                }
            },
        )

    def _probed(self, task: ProbeTask, death: str | None) -> None:
        unit = (task.stream, task.unit)
        self._probes[unit][task.index] = death
        self._probing[unit].discard(task.index)
        if not self._probing[unit]:
            ends = self._probes.pop(unit)
            killers = {i: text for i, text in ends.items() if text is not None}
            if len(killers) == len(ends):
                raise RuntimeError(f"every candidate of {self.plan.by_id[task.stream].name} ends its worker")
            self._again.append(UnitTask(*unit, killers=killers))


def tallies(plans: Iterable[StreamPlan], streams: Mapping[str, Stream]) -> dict[str, Tally]:
    """Target → counts over its streams, as far as is known."""
    found: dict[str, Tally] = {}
    for plan in plans:
        sums, counts = found.setdefault(plan.target, Tally(0)), streams[plan.id].tally()
        for name, count in vars(counts).items():
            setattr(sums, name, getattr(sums, name) + count)
    return found
