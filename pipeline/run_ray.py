"""The Ray runner: one actor pinned to each device, fed by a small `ray.wait` loop.

An actor holds the models once and keeps `IN_FLIGHT` tasks: one computes while another encodes and commits.
Images do not cross the object store; receipts do. The loop looks at the cluster every few seconds: new nodes
get workers as long as there is work for them, and the tasks of a worker that died, hung or went with its node
are run again elsewhere, which is harmless because every commit is put-if-absent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.capacity import Share, matching, share_of
from pipeline.metrics import Measured, Metrics, Pace
from pipeline.plan import Plan
from pipeline.store import Store
from pipeline.tasks import (
    PackTask,
    Receipt,
    Suspects,
    Task,
    UnitReceipt,
    UnitTask,
    Work,
    facts_of,
    identity,
)
from pipeline.telemetry import Telemetry
from schemas.errors import UserError

log = logging.getLogger("seedloom")

IN_FLIGHT = 2
# Seconds between two looks at the cluster.
LOOK = 3.0
# Seconds that a cluster which was named has to answer.
ANSWER = 20.0
# Seconds after which a start without any worker is remarked on; and that a second try waits for another
# worker to come up, while nothing else is to be done.
PATIENCE = 60.0
# Lost or failed actors per worker, one after another, before anything completes: another will not do better.
FRUITLESS = 8


class _Actor:
    """What lives on a device. The constructor does nothing that can fail; `setup` loads the models."""

    def __init__(self) -> None:
        _obey_sigterm()

    def setup(self, plan: Plan, uri: str) -> str:
        """Returns the id of the node."""
        from pipeline.worker import Worker

        self.worker = Worker(plan, uri)
        self.metrics = Metrics(plan)
        self.told, self.lock = 0, threading.Lock()  # retries of the store
        return ray.get_runtime_context().get_node_id()

    def run(self, task: Task) -> Receipt:
        started = time.monotonic()
        receipt = self.worker.run(task)
        stages = self.worker.device.seconds()
        if isinstance(task, PackTask):
            stages = {"pack": time.monotonic() - started}
        for stage, seconds in stages.items():
            self.metrics.add("stage_seconds", seconds, stage=stage)
        with self.lock:
            before, self.told = self.told, self.worker.store.retries
            self.metrics.add("store_retries", self.told - before)
        return receipt


class _Packer:
    """What packs on a core and needs no models."""

    def __init__(self) -> None:
        _obey_sigterm()

    def setup(self, plan: Plan, uri: str) -> str:
        self.plan, self.store = plan, Store(uri)
        self.metrics = Metrics(plan)
        return ray.get_runtime_context().get_node_id()

    def run(self, task: PackTask) -> Receipt:
        from pipeline.pack import write_shards

        started = time.monotonic()
        receipt = write_shards(self.store, self.plan, task)
        self.metrics.add("stage_seconds", time.monotonic() - started, stage="pack")
        return receipt


def _obey_sigterm() -> None:
    """Have this actor end at once when its machine is to be taken away: every write is whole or is not there.

    Ray's own handler waits for what runs in other threads than the main one, however long that takes.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(eq=False)
class _Seat:
    """A place for an actor, and what its actor is doing."""

    actor: Any
    loading: Any  # reference that resolves to the id of its node when the models are loaded
    device: bool  # it has one; what has none can only pack
    up: bool = False  # its models are loaded: it may be given tasks
    node: str = ""
    tasks: list[Task] = field(default_factory=list)
    alone: bool = False  # its task may have killed or hung an actor: nothing else runs beside it
    since: float = 0.0  # when it completed something, or was given a task after it had none


class RayRunner:
    actor: type = _Actor
    expected: int | None = None

    def __init__(self, plan: Plan, uri: str):
        self.plan, self.uri, self.settings = plan, uri, plan.config.run
        self.restarts = self.retries = self.workers = 0
        self.worker_seconds = 0.0
        self.metrics: Metrics | None = None

    def given(self) -> Any:
        """What the actors are set up with, beside the address of the store."""
        return self.plan

    def watch(self, telemetry: Telemetry) -> Telemetry:
        return Measured(telemetry, lambda: self.metrics)

    def __enter__(self) -> RayRunner:
        self.seats: list[_Seat] = []
        self.fruitless = 0  # deaths and failed starts since anything completed
        self._own = not ray.is_initialized()
        try:
            if self._own:
                _connect()
            self.metrics = Metrics(self.plan)
            self._arrange(ray.nodes())
            self._given = ray.put(self.given())
            self._wait_for_one()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for seat in self.seats:
            with contextlib.suppress(Exception):
                ray.kill(seat.actor)
        self.metrics = None
        if self._own:
            ray.shutdown()

    # --- how many workers --------------------------------------------------------------------------------

    def _arrange(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Decide what a worker takes, from the nodes that there are as the build starts."""
        self._labels = {
            key: value if isinstance(value, str) else f"in({','.join(value)})"
            for key, value in self.settings.labels.items()
        }
        self.share = share_of(self.settings, matching(nodes, self.settings.labels))
        self.look(nodes)

    def look(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """How many workers there may be, with and without a device, given these nodes."""
        if self.settings.workers == "auto":
            self.most = max(1, self.share.places(matching(nodes, self.settings.labels)))
        else:
            self.most = self.settings.workers
        self.most_packers = 0
        if self.share.gpus:
            places = Share(0, 1).places(matching(nodes, {}))
            asked = self.settings.cpu_workers
            self.most_packers = places if asked == "auto" else min(asked, places)

    def fit(self, wanted: int, packers: int = 0) -> None:
        """Have so many workers, as far as there may be; those that are up stay."""
        wanted = max(1, min(wanted, self.most))
        with_device = [seat for seat in self.seats if seat.device]
        for seat in [s for s in with_device if not s.up][: max(0, len(with_device) - self.most)]:
            self.drop(seat)  # for a node that is gone
            with_device.remove(seat)
        more = wanted - len(with_device)
        if more > 0:
            self.seats += [self._seat() for _ in range(more)]
            text = f"workers: {wanted}, of which {more} are starting"
            _tell(logging.INFO, text, build=self.plan.build_id)
        packers = min(packers, self.most_packers) - (len(self.seats) - max(len(with_device), wanted))
        self.seats += [self._seat(device=False) for _ in range(packers)]
        self.workers = max(self.workers, len(with_device), wanted)

    def _wait_for_one(self) -> None:
        """Start workers until one is up: a mistake of the user's shows in any of them, in one line."""
        expected, remarked = self.most if self.expected is None else self.expected, time.monotonic()
        while not any(seat.up for seat in self.seats):
            self.look(ray.nodes())
            self.fit(max(1, expected))
            ready, _ = ray.wait([seat.loading for seat in self.seats], timeout=min(LOOK, PATIENCE))
            self.seat_those_of(ready)
            if not ready and time.monotonic() - remarked > PATIENCE:
                remarked = time.monotonic()
                _tell(logging.WARNING, self._waiting_for(ray.available_resources()))

    def _waiting_for(self, free: Mapping[str, float]) -> str:
        """What to tell a person when no worker starts: most likely somebody else holds what it needs."""
        asked = {"GPU": self.share.gpus, "CPU": self.share.cpus}
        needs = [f"{name} {amount:g} of {free.get(name, 0):g} free" for name, amount in asked.items()]
        needs += [f"a node with the label {key} {value}" for key, value in self._labels.items()]
        return (
            f"seedloom: no worker has started for {PATIENCE:.0f} s; each needs {', '.join(needs)};"
            " still waiting"
        )

    # --- actors ------------------------------------------------------------------------------------------

    def _seat(self, device: bool = True) -> _Seat:
        # OpenMP reads this once, when it starts
        environment = {"OMP_NUM_THREADS": str(self.settings.threads_per_worker)}
        if not device:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray would show it all that there are
        options: dict[str, Any] = {
            "num_gpus": self.share.gpus if device else 0,
            "num_cpus": self.share.cpus if device else 1,
            "max_concurrency": IN_FLIGHT if device else 1,
            "runtime_env": {"env_vars": environment},
        }
        if device and self._labels:
            options["label_selector"] = self._labels
        actor = ray.remote(**options)(self.actor if device else _Packer).remote()
        return _Seat(actor, actor.setup.remote(self._given, self.uri), device)

    def drop(self, seat: _Seat) -> None:
        with contextlib.suppress(Exception):
            ray.kill(seat.actor)  # it may only be out of reach, and still hold its device
        self.seats.remove(seat)

    def give_up(self, seat: _Seat, why: str) -> None:
        """Drop an actor that did not do what it was to do, and tell of it."""
        self.drop(seat)
        self.restarts += 1
        if self.metrics:
            self.metrics.add("restarts")
        tasks = [facts_of(self.plan, task) for task in seat.tasks]
        _tell(logging.WARNING, why, build=self.plan.build_id, node=seat.node, tasks=tasks)

    def seat_those_of(self, loaded: Sequence[Any]) -> None:
        """Take the actors whose loading ended into service; give up those that could not load."""
        for seat in [s for s in self.seats if not s.up and s.loading in loaded]:
            try:
                seat.node = ray.get(seat.loading)
            except RayError as error:
                self.lost(seat, error)
            else:
                seat.up = True

    def lost(self, seat: _Seat, error: RayError) -> bool:
        """Give up an actor that died, or could not load. Returns whether its node is gone as well."""
        cause = _cause(error)
        if isinstance(cause, UserError):
            raise cause from None
        gone = bool(seat.node) and not any(n["Alive"] and n["NodeID"] == seat.node for n in ray.nodes())
        self.give_up(seat, f"a worker was lost{' with its node' if gone else ''}: {_short(error)}")
        if not gone:
            self.fruitless += 1
            patience = self.settings.retries + 1 if isinstance(error, RayTaskError) else FRUITLESS
            if self.fruitless >= patience * max(1, min(self.workers, self.most)):
                raise RuntimeError(
                    f"{self.fruitless} workers were lost one after another, nothing was done; see the Ray"
                    " logs"
                ) from error
        return gone

    def run(self, work: Work) -> None:
        try:
            _Phase(self, work).carry()
        finally:
            for seat in [s for s in self.seats if not s.device]:
                self.drop(seat)


class _Phase:
    """The tasks of one phase, on their way to workers and back."""

    def __init__(self, runner: RayRunner, work: Work):
        self.runner, self.work, self.retries = runner, work, runner.settings.retries
        self.ahead: deque[Task] = deque()  # taken from the work before there was room
        self.again: deque[Task] = deque()  # to be run once more
        self.solo: deque[Task] = deque()  # to be run once more, with nothing beside it
        self.deaths: Counter[Any] = Counter()  # actors lost while they ran this and nothing else
        self.hangs: Counter[Any] = Counter()  # the same of those that hung
        self.tries: Counter[Any] = Counter()  # unexpected errors
        self.last_seat: dict[Any, _Seat] = {}
        self.flying: dict[Any, tuple[Task, _Seat]] = {}
        self.wants_another = False  # there are tasks for which the only actor is the one that failed before
        self.lonely_since: float | None = None  # and nothing else is to be done
        self.packing = self.making = False
        self.looked = self.counted = time.monotonic()
        self.pace, self.images, self.busy = Pace(), 0, 0.0

    def carry(self) -> None:
        """Until nothing is left to be done."""
        while True:
            self.fit()
            self.feed()
            seats = self.runner.seats
            loading = [seat.loading for seat in seats if not seat.up]
            self.look_ahead(1)
            if not self.left() and any(seat.up for seat in seats):
                return
            ready, _ = ray.wait([*self.flying, *loading], timeout=LOOK)
            self.count()
            self.runner.seat_those_of(ready)
            for ref in ready:
                if ref in self.flying:  # else it was a loading, or went down with its actor a moment ago
                    self.land(ref)
            self.end_hung()

    def fit(self) -> None:
        """Have workers for what is left, as far as the cluster has room."""
        runner = self.runner
        if time.monotonic() - self.looked > LOOK:
            self.looked = time.monotonic()
            runner.look(ray.nodes())
            self.measure()
        devices = sum(seat.device for seat in runner.seats)
        packers = runner.most_packers if self.packing else 0
        if packers:
            self.look_ahead(packers + IN_FLIGHT * devices)
            runner.fit(0, packers=self.left() - IN_FLIGHT * devices)
        else:
            if devices < runner.most:
                self.look_ahead(runner.most)
            runner.fit(max(self.left(), 2 if self.wants_another else 0))

    def look_ahead(self, tasks: int) -> None:
        """Learn whether so many tasks are left."""
        while self.left() < tasks and (task := self.take()):
            self.ahead.append(task)

    def left(self) -> int:
        return len(self.flying) + len(self.again) + len(self.solo) + len(self.ahead)

    # --- to the workers ----------------------------------------------------------------------------------

    def start(self, task: Task, seat: _Seat, alone: bool = False) -> None:
        if not seat.tasks:
            seat.since = time.monotonic()
        seat.tasks.append(task)
        seat.alone = alone
        self.making |= isinstance(task, UnitTask)
        self.last_seat[identity(task)] = seat
        self.flying[seat.actor.run.remote(task)] = (task, seat)

    def next(self) -> Task | None:
        if self.again:
            return self.again.popleft()
        return self.ahead.popleft() if self.ahead else self.take()

    def take(self) -> Task | None:
        task = self.work.next()
        self.packing |= isinstance(task, PackTask)
        return task

    def feed(self) -> None:
        """Give tasks to the workers that have room."""
        ours = [s for s in self.runner.seats if s.up and not s.alone]
        ours.sort(key=lambda s: len(s.tasks))
        while self.solo and ours and not ours[0].tasks:
            self.start(self.solo.popleft(), ours.pop(0), alone=True)
        ours = ours[len(self.solo) :]  # the others run dry for what is to run alone
        waiting = []
        while (room := [s for s in ours if len(s.tasks) < IN_FLIGHT]) and (task := self.next()):
            # a second try goes to another actor where there may be one
            before = self.last_seat.get(identity(task)) if self.runner.most > 1 else None
            if others := [s for s in room if s is not before]:
                self.start(task, min(others, key=lambda s: len(s.tasks)))
            else:
                waiting.append(task)
        self.wants_another = bool(waiting)
        if not waiting or self.flying:
            self.lonely_since = None
        else:
            self.lonely_since = self.lonely_since or time.monotonic()
            # another may never come up
            if self.lonely() or time.monotonic() - self.lonely_since > PATIENCE:
                self.start(waiting.pop(0), ours[0])
        self.again.extend(waiting)

    def lonely(self) -> bool:
        """All the workers that there may be are up."""
        seats = self.runner.seats
        return all(s.up for s in seats) and len(seats) >= min(2, self.runner.most)

    # --- and back ----------------------------------------------------------------------------------------

    def land(self, ref: Any) -> None:
        task, seat = self.flying[ref]
        try:
            receipt = ray.get(ref)
        except RayTaskError as error:
            self.landed(ref)
            self.failed(task, seat, error)
        except RayError as error:
            self.lost(seat, error)
        else:
            self.landed(ref)
            self.runner.fruitless = 0
            if not isinstance(receipt, Suspects):  # their second try is another worker's
                self.last_seat.pop(identity(task), None)
            if isinstance(receipt, UnitReceipt):
                self.busy += receipt.seconds
                self.images += len(receipt.outcomes) if receipt.generated else 0
            self.work.done(task, receipt)

    def landed(self, ref: Any) -> None:
        task, seat = self.flying.pop(ref)
        seat.tasks.remove(task)
        seat.alone = False
        seat.since = time.monotonic()

    def failed(self, task: Task, seat: _Seat, error: RayTaskError) -> None:
        """Try a task again that raised what it should not, or give up."""
        cause = _cause(error)
        self.tries[identity(task)] += 1
        if isinstance(cause, UserError) or self.tries[identity(task)] > self.retries:
            raise cause from (None if isinstance(cause, UserError) else error)
        facts = facts_of(self.runner.plan, task)
        _tell(
            logging.WARNING,
            f"{facts['task']}: tried again after {type(cause).__name__}: {_short(cause)}",
            build=self.runner.plan.build_id, node=seat.node, **facts,
        )  # fmt: skip
        self.retried()
        self.again.append(task)

    def retried(self) -> None:
        self.runner.retries += 1
        if self.runner.metrics:
            self.runner.metrics.add("retries")

    def lost(self, seat: _Seat, error: RayError) -> None:
        """Run the tasks of an actor that died again."""
        self.forget(seat)
        gone = self.runner.lost(seat, error)
        for task in seat.tasks:
            name = identity(task)
            if gone:
                self.again.append(task)  # it is not to blame
                continue
            self.deaths[name] += seat.alone
            # taking a unit apart harms nothing; believing a candidate's guilt takes two deaths
            if self.deaths[name] >= (1 if type(task) is UnitTask else 2):
                self.deaths[name] = 0
                self.work.killed(task)
            else:
                self.solo.append(task)

    def forget(self, seat: _Seat) -> None:
        for ref in [r for r, (_, s) in self.flying.items() if s is seat]:
            del self.flying[ref]

    def end_hung(self) -> None:
        """End workers that completed nothing for too long; what they ran is run again, alone."""
        limit, now = self.runner.settings.unit_timeout, time.monotonic()
        for seat in list(self.runner.seats):
            if limit is None or not seat.tasks or now - seat.since <= limit:
                continue
            said = {identity(task): facts_of(self.runner.plan, task)["task"] for task in seat.tasks}
            told = f"a worker was ended that completed nothing for {limit:g} s: {', '.join(said.values())}"
            self.forget(seat)
            self.runner.give_up(seat, told)
            for task in seat.tasks:
                self.hangs[identity(task)] += len(seat.tasks) == 1  # of two, one may only have waited
                if self.hangs[identity(task)] > self.retries:
                    raise UserError(
                        f"{said[identity(task)]}: not done within {limit:g} s (run.unit_timeout),"
                        f" tried {self.hangs[identity(task)]} times; raise it, or see why it hangs. Nothing"
                        " is lost"
                    )
                self.retried()
                self.solo.append(task)

    # --- what is to be seen of it ------------------------------------------------------------------------

    def count(self) -> None:
        now = time.monotonic()
        if self.making:
            up = sum(seat.up and seat.device for seat in self.runner.seats)
            self.runner.worker_seconds += up * (now - self.counted)
        self.counted = now

    def measure(self) -> None:
        runner = self.runner
        if runner.metrics:
            speed, share = self.pace.look(self.images, self.busy, runner.worker_seconds)
            up = sum(seat.up for seat in runner.seats)
            runner.metrics.set(images_per_second=speed, device_busy_share=share, workers=up)


def _connect() -> None:
    """To the cluster of RAY_ADDRESS, as in a Ray job, or to a new instance on this machine."""
    on_term = signal.getsignal(signal.SIGTERM)
    host, _, port = (address := os.environ.get("RAY_ADDRESS", "")).rpartition(":")
    until = time.monotonic() + ANSWER
    while host and "/" not in host and port.isdecimal():  # Ray itself would try for more than five minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); check it, or unset it to"
                    " work on this machine alone"
                ) from error
            time.sleep(1)
    ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray's own would end this process on the spot


def _cause(error: RayError) -> BaseException:
    """What was raised in the actor, when it is that and can be had here."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _tell(level: int, text: str, **facts: Any) -> None:
    log.log(level, text, extra={"facts": facts})
