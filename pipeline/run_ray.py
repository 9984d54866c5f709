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
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.plan import Plan
from pipeline.tasks import Receipt, Suspects, Task, UnitTask, Work
from schemas.errors import UserError

log = logging.getLogger("seedloom")

IN_FLIGHT = 2
# Seconds after which a start without any worker is remarked on; and that a second try waits for another
# worker to come up, while nothing else is to be done.
PATIENCE = 60.0
# Lost or failed actors per worker, one after another, before anything completes: another will not do better.
FRUITLESS = 8


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
    loading: Any  # reference that resolves when the models are loaded
    up: bool = False  # they are: it may be given tasks
    tasks: list[Task] = field(default_factory=list)
    alone: bool = False  # its task may have killed an actor: nothing else runs beside it


def identity(task: Task) -> Any:
    """Equal for all tries of one piece of work, whatever is suspected of it."""
    return (task.stream, task.unit) if type(task) is UnitTask else task


class RayRunner:
    actor: type = _Actor

    def __init__(self, plan: Plan, uri: str):
        self.plan, self.uri, self.settings = plan, uri, plan.config.run
        self.restarts = self.retries = 0

    def __enter__(self) -> RayRunner:
        self._seats: list[_Seat] = []
        self._fruitless = 0  # deaths and failed starts since anything completed
        self._own = not ray.is_initialized()
        try:
            if self._own:
                on_term = signal.getsignal(signal.SIGTERM)
                ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, on_term)  # Ray's own would end this process on the spot
            self._options = self._share(ray.cluster_resources())
            self._plan = ray.put(self.plan)
            self._seats = [self._seat() for _ in range(self.workers)]
            # a mistake of the user's shows in any worker: one line, at once
            while not any(seat.up for seat in self._seats):
                ready, _ = ray.wait([seat.loading for seat in self._seats], timeout=PATIENCE)
                if not ready:
                    log.warning("%s", self._waiting_for(ray.available_resources()))
                self._seat_those_of(ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _share(self, resources: Mapping[str, float]) -> dict[str, Any]:
        """How many workers there are, and what each takes of the resources."""
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        threads, share = self.settings.threads_per_worker, self.settings.gpus_per_worker
        if gpus and (share > gpus or (share > 1 and share % 1)):
            raise UserError(
                f"run.gpus_per_worker: {share:g} given; allowed are a share of one GPU, or a whole number"
                f" up to the {gpus:g} that there are"
            )
        if self.settings.workers == "auto":
            self.workers = max(1, int(gpus / share if gpus else cpus / threads))
        else:
            self.workers = self.settings.workers
        return {
            "num_gpus": share if gpus else 0,
            # a GPU actor must not wait for a CPU; CPU actors share what there is
            "num_cpus": 0 if gpus else min(threads, cpus / self.workers),
            "max_concurrency": IN_FLIGHT,
            # OpenMP reads this once, when it starts
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }

    def _waiting_for(self, free: Mapping[str, float]) -> str:
        """What to tell a person when no worker starts: most likely somebody else holds what it needs."""
        asked = {"GPU": self._options["num_gpus"], "CPU": self._options["num_cpus"]}
        needs = ", ".join(
            f"{name} {amount:g} of {free.get(name, 0):g} free" for name, amount in asked.items()
        )
        return f"seedloom: no worker has started for {PATIENCE:.0f} s; each needs {needs}; still waiting"

    def __exit__(self, *error: object) -> None:
        for seat in self._seats:
            with contextlib.suppress(Exception):
                ray.kill(seat.actor)
        if self._own:
            ray.shutdown()

    def _seat(self) -> _Seat:
        actor = ray.remote(**self._options)(self.actor).remote()
        return _Seat(actor, actor.setup.remote(self._plan, self.uri))

    def _seat_those_of(self, loaded: list[Any]) -> None:
        """Take the actors whose loading ended into service; replace those that could not load."""
        for seat in [s for s in self._seats if not s.up and s.loading in loaded]:
            try:
                ray.get(seat.loading)
            except RayError as error:
                self._replace(seat, error)
            else:
                seat.up = True

    def _replace(self, seat: _Seat, error: RayError) -> None:
        """Put a new actor in the place of one that was lost, or that could not load."""
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        with contextlib.suppress(Exception):
            ray.kill(seat.actor)  # it may only be out of reach, and still hold its device
        self._fruitless += 1
        patience = self.settings.retries + 1 if isinstance(error, RayTaskError) else FRUITLESS
        if self._fruitless >= patience * self.workers:
            raise RuntimeError(
                f"{self._fruitless} workers were lost one after another, nothing was done; see the Ray logs"
            ) from error
        self.restarts += 1
        self._seats[self._seats.index(seat)] = self._seat()

    def run(self, work: Work) -> None:
        again: deque[Task] = deque()  # to be run once more
        solo: deque[Task] = deque()  # to be run once more, with nothing beside it
        deaths: Counter[Any] = Counter()  # actors lost while they ran this and nothing else
        tries: Counter[Any] = Counter()  # unexpected errors
        last_seat: dict[Any, _Seat] = {}
        flying: dict[Any, tuple[Task, _Seat]] = {}

        def start(task: Task, seat: _Seat, alone: bool = False) -> None:
            seat.tasks.append(task)
            seat.alone = alone
            last_seat[identity(task)] = seat
            flying[seat.actor.run.remote(task)] = (task, seat)

        lonely_since: float | None = None  # when only an actor that failed before was left for a second try

        def feed() -> None:
            nonlocal lonely_since
            ours = [s for s in self._seats if s.up and not s.alone]
            ours.sort(key=lambda s: len(s.tasks))
            while solo and ours and not ours[0].tasks:
                start(solo.popleft(), ours.pop(0), alone=True)
            ours = ours[len(solo) :]  # the others run dry for what is to run alone
            waiting = []
            while (room := [s for s in ours if len(s.tasks) < IN_FLIGHT]) and (task := next_task()):
                # a second try goes to another actor where there is one
                before = last_seat.get(identity(task)) if self.workers > 1 else None
                if others := [s for s in room if s is not before]:
                    start(task, min(others, key=lambda s: len(s.tasks)))
                else:
                    waiting.append(task)
            if not waiting or flying:
                lonely_since = None
            else:
                lonely_since = lonely_since or time.monotonic()
                others_up = all(s.up for s in self._seats)
                if others_up or time.monotonic() - lonely_since > PATIENCE:  # they may never come up
                    start(waiting.pop(0), ours[0])
            again.extend(waiting)

        def next_task() -> Task | None:
            return again.popleft() if again else work.next()

        def lost(seat: _Seat, error: RayError) -> None:
            """Replace an actor that died, and run its tasks again."""
            for ref in [r for r, (_, s) in flying.items() if s is seat]:
                del flying[ref]
            self._replace(seat, error)
            for task in seat.tasks:
                name = identity(task)
                deaths[name] += seat.alone
                # taking a unit apart harms nothing; believing a candidate's guilt takes two deaths
                if deaths[name] >= (1 if type(task) is UnitTask else 2):
                    deaths[name] = 0
                    work.killed(task)
                else:
                    solo.append(task)

        while True:
            feed()
            loading = [seat.loading for seat in self._seats if not seat.up]
            if not (flying or again or solo) and any(seat.up for seat in self._seats):
                return  # there was room, and nothing more to be done
            ready, _ = ray.wait([*flying, *loading], timeout=PATIENCE)
            self._seat_those_of(ready)
            for ref in ready:
                if ref not in flying:
                    continue  # was a loading, or went down with its actor a moment ago
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
                except RayError as error:
                    lost(seat, error)
                else:
                    del flying[ref]
                    seat.tasks.remove(task)
                    seat.alone = False
                    self._fruitless = 0
                    if not isinstance(receipt, Suspects):
                        last_seat.pop(identity(task), None)
                    work.done(task, receipt)


def _cause(error: RayError) -> BaseException:
    """What was raised in the actor, when it is that and can be had here."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
