"""The units of work that a runner carries to workers, and the receipts that come back.

Seven kinds: batch (choose one), invert, assess (the seeds of a class), prepare, unit (generate and score),
probe (one suspect alone), pack. A task is small and can be run any number of times: its result is put if
absent, and a receipt is read from what was committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.telemetry import Telemetry
from schemas.records import Reference

if TYPE_CHECKING:
    from pipeline.plan import Plan


@dataclass(frozen=True)
class BatchTask:
    """Try device batches and commit the largest that runs."""

    stream: str  # any stream of the recipe


@dataclass(frozen=True)
class InvertTask:
    stream: str  # any stream with these inversion settings and this prompt
    references: tuple[Reference, ...]  # at most one device batch
    killer: str = (
        ""  # why this one reference is refused without another try: it ends any process that inverts it
    )


@dataclass(frozen=True)
class AssessTask:
    """Look at the seeds of a stream: do they suffice, are they independent?"""

    stream: str


@dataclass(frozen=True)
class PrepareTask:
    stream: str  # any stream with this artifact
    kind: str  # of the stage that makes it


@dataclass(frozen=True)
class UnitTask:
    """Generate a unit if its part is absent, then compute the scores that are absent.

    `suspects` are the candidates that raised in earlier tries, with what they raised; one that raises the
    same again is committed as failed. `killers` are known to end any process that runs them.
    """

    stream: str
    unit: int
    suspects: Mapping[int, str] = field(default_factory=dict, hash=False)
    killers: Mapping[int, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ProbeTask:
    """Run one candidate alone in an otherwise dummy batch and commit nothing: does its worker survive?"""

    stream: str
    unit: int
    index: int


@dataclass(frozen=True)
class PackTask:
    """Write these shards."""

    first: int  # number of the first shard
    parts: tuple[tuple[str, int], ...] = field(compare=False)  # stream, unit
    # of each its rows in order, (rows, 2): the number of a part above, and the place of a candidate in it
    shards: tuple[np.ndarray, ...] = field(compare=False)


Task = BatchTask | InvertTask | AssessTask | PrepareTask | UnitTask | ProbeTask | PackTask


@dataclass(frozen=True)
class Done:
    """Receipt of a task of which nothing but its completion is of interest."""

    items: int  # seeds, artifacts or batches


@dataclass(frozen=True)
class SeedsReceipt:
    """What there is to know of a stream's seeds."""

    used: int
    refused: Mapping[str, str]  # origin of the reference → reason
    correlation: float | None  # mean cosine of the used seeds; None for one
    dimensions: int  # d of a seed
    combined: int  # seeds that a candidate combines, at least


@dataclass(frozen=True)
class UnitReceipt:
    outcomes: tuple[str, ...]  # one a candidate, as `pipeline.select` knows them
    environment: str  # of the part, canonical JSON
    generated: bool  # whether this call committed the part
    seconds: float  # device time of this call
    bytes: int  # of the part, when generated


@dataclass(frozen=True)
class Suspects:
    """Nothing was committed: these candidates raised, and must raise again elsewhere to be believed."""

    raised: Mapping[int, str]


@dataclass(frozen=True)
class ShardReceipt:
    name: str  # "000123"
    rows: int
    tar_bytes: int
    tar_sha256: str
    parquet_bytes: int
    parquet_sha256: str


@dataclass(frozen=True)
class Outdated:
    """Nothing was written: these units are gone from the store, or are not what selection was told."""

    units: tuple[tuple[str, int], ...]  # stream, unit


Receipt = Done | SeedsReceipt | UnitReceipt | Suspects | tuple[ShardReceipt, ...] | Outdated


def identity(task: Task) -> Any:
    """Equal for all tries of one piece of work, whatever is suspected of it."""
    return (task.stream, task.unit) if type(task) is UnitTask else task


def facts_of(plan: Plan, task: Task) -> dict[str, Any]:
    """What a log says of a task: in words, and its stream, unit and candidates where it has them."""
    if isinstance(task, PackTask):
        return {"task": f"the shards from {task.first:06d} on"}
    stream = plan.by_id[task.stream]
    kind = type(task).__name__.removesuffix("Task").lower()
    if isinstance(task, (UnitTask, ProbeTask)):
        first = task.unit * stream.unit
        indices = [task.index] if isinstance(task, ProbeTask) else range(first, first + stream.unit)
        return {
            "task": f"{kind} {task.unit} of {stream.name}",
            "stream": stream.id,
            "unit": task.unit,
            "candidates": [stream.key(index) for index in indices],
        }
    return {"task": f"{kind} of {stream.name}", "stream": stream.id}


class Work(Protocol):
    """A phase of a build, as a runner sees it: tasks come out, receipts go in, in any order."""

    def next(self) -> Task | None:
        """A task that can be started now, or None. After None, receipts may make more."""
        ...

    def done(self, task: Task, receipt: Receipt) -> None: ...

    def killed(self, task: Task) -> None:
        """The task ended its worker while nothing else ran on it, twice if it is no unit. May raise."""
        ...


class Runner(Protocol):
    """Carries out work. A context manager: leaving it ends the workers."""

    expected: int | None  # tasks of the largest phase, if set before entering: so many workers suffice
    workers: int  # at one time, at most
    worker_seconds: float  # that workers with their models loaded had for units
    restarts: int  # of workers
    retries: int  # of tasks

    def watch(self, telemetry: Telemetry) -> Telemetry:
        """The telemetry to tell, for one that wants to know how the build goes."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, work: Work) -> None:
        """Until the work has no more tasks and every receipt is in."""
        ...
