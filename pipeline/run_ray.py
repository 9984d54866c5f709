"""The Ray runner: one actor pinned to each device, fed by a small `ray.wait` loop.

An actor holds the models once and keeps `IN_FLIGHT` tasks: one computes while another encodes and commits.
Images do not cross the object store; receipts do. A dead actor is replaced and its tasks are run again, which
is harmless because every commit is put-if-absent.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.plan import Plan
from pipeline.tasks import Receipt, Task, UnitTask, Work
from schemas.errors import UserError

IN_FLIGHT = 2
# An actor that dies so often before anything completes will not get well by another try.
FRUITLESS_DEATHS = 6


class _Actor:
    """What lives on a device. The constructor does nothing that can fail; `setup` loads the models."""

    def setup(self, plan: Plan, uri: str) -> None:
        from pipeline.worker import Worker

        self.worker = Worker(plan, uri)

    def run(self, task: Task) -> Receipt:
        return self.worker.run(task)


@dataclass(eq=False)
class _Seat:
    """A place for an actor, and what its actor is doing."""

    actor: Any
    ready: Any  # reference that resolves when the models are loaded
    tasks: list[Task] = field(default_factory=list)
    alone: bool = False  # its task may have killed an actor: nothing else runs beside it


def identity(task: Task) -> Any:
    """Equal for all tries of one piece of work, whatever is suspected of it."""
    return (task.stream, task.unit) if type(task) is UnitTask else task


class RayRunner:
    def __init__(self, plan: Plan, uri: str):
        self.plan, self.uri, self.settings = plan, uri, plan.config.run
        self.restarts = self.retries = 0

    def __enter__(self) -> RayRunner:
        self._own = not ray.is_initialized()
        if self._own:
            on_term = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)  # Ray's own would end this process on the spot
        resources = ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        threads, share = self.settings.threads_per_worker, self.settings.gpus_per_worker
        if self.settings.workers == "auto":
            self.workers = max(1, int(gpus / share if gpus else cpus / threads))
        else:
            self.workers = self.settings.workers
        self._options = {
            "num_gpus": share if gpus else 0,
            # a GPU actor must not wait for a CPU; CPU actors share what there is
            "num_cpus": 0 if gpus else min(threads, cpus / self.workers),
            "max_concurrency": IN_FLIGHT,
            # OpenMP reads this once, when it starts
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        self._plan = ray.put(self.plan)
        self._seats = [self._seat() for _ in range(self.workers)]
        try:
            self._until_ready(
                self._seats[0]
            )  # a mistake of the user's shows in any worker: one line, at once
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for seat in self._seats:
            with contextlib.suppress(Exception):
                ray.kill(seat.actor)
        if self._own:
            ray.shutdown()

    def _seat(self) -> _Seat:
        actor = ray.remote(**self._options)(_Actor).remote()
        return _Seat(actor, actor.setup.remote(self._plan, self.uri))

    def _until_ready(self, seat: _Seat) -> None:
        try:
            ray.get(seat.ready)
        except RayTaskError as error:
            raise _cause(error) from None

    def run(self, work: Work) -> None:
        again: deque[Task] = deque()  # to be run once more
        solo: deque[Task] = deque()  # to be run once more, with nothing beside it
        deaths: Counter[Any] = Counter()  # actors lost with this work in flight
        alone_deaths: Counter[Any] = Counter()
        tries: Counter[Any] = Counter()  # unexpected errors
        last_seat: dict[Any, _Seat] = {}
        flying: dict[Any, tuple[Task, _Seat]] = {}
        fruitless = 0

        def start(task: Task, seat: _Seat, alone: bool = False) -> None:
            seat.tasks.append(task)
            seat.alone = alone
            last_seat[identity(task)] = seat
            flying[seat.actor.run.remote(task)] = (task, seat)

        def room() -> list[_Seat]:
            return [s for s in self._seats if not s.alone and len(s.tasks) < IN_FLIGHT]

        def seat_for(task: Task) -> _Seat | None:
            """The least busy actor; a second try goes to another one where there are several."""
            before = last_seat.get(identity(task)) if len(self._seats) > 1 else None
            return min((s for s in room() if s is not before), key=lambda s: len(s.tasks), default=None)

        def feed() -> None:
            while solo and (idle := [s for s in self._seats if not s.tasks]):
                start(solo.popleft(), idle[0], alone=True)
            if solo:  # let an actor run dry
                return
            waiting = []
            while room() and (task := again.popleft() if again else work.next()):
                if seat := seat_for(task):
                    start(task, seat)
                else:
                    waiting.append(task)
            again.extend(waiting)

        def lost(seat: _Seat) -> None:
            """Replace an actor that died, and run its tasks again."""
            nonlocal fruitless
            fruitless += 1
            self.restarts += 1
            for ref in [r for r, (_, s) in flying.items() if s is seat]:
                del flying[ref]
            for task in seat.tasks:
                name = identity(task)
                deaths[name] += 1
                alone_deaths[name] += seat.alone
                if alone_deaths[name] >= 2:
                    alone_deaths[name] = deaths[name] = 0
                    fruitless = 0
                    work.killed(task)
                elif deaths[name] >= 2:
                    solo.append(task)
                else:
                    again.append(task)
            self._seats[self._seats.index(seat)] = self._seat()
            if fruitless >= FRUITLESS_DEATHS:
                raise RuntimeError(
                    f"{fruitless} workers died one after another before anything was done; see the Ray logs"
                )

        while True:
            feed()
            if not flying:
                if again or solo:
                    continue
                return
            ready, _ = ray.wait(list(flying), num_returns=1)
            for ref in ready:
                if ref not in flying:
                    continue  # went down with its actor a moment ago
                task, seat = flying[ref]
                try:
                    receipt = ray.get(ref)
                except RayTaskError as error:
                    del flying[ref]
                    seat.tasks.remove(task)
                    seat.alone = False
                    cause = _cause(error)
                    tries[identity(task)] += 1
                    if isinstance(cause, UserError) or tries[identity(task)] > self.settings.retries:
                        raise cause from (None if isinstance(cause, UserError) else error)
                    self.retries += 1
                    again.append(task)
                except RayActorError:
                    lost(seat)
                else:
                    del flying[ref]
                    seat.tasks.remove(task)
                    seat.alone = False
                    fruitless = 0
                    work.done(task, receipt)


def _cause(error: RayTaskError) -> BaseException:
    return error.cause if isinstance(error.cause, BaseException) else error
