"""`seedloom benchmark scale`: the bookkeeping of millions of candidates, and 64 devices on one machine.

**Bookkeeping.** The driver of a build, but for its workers: a real config, plan, index and packing plan, on a
store that takes a while for every call. Two processes for each size. The first plans, hands out units to
devices that answer at once, in another order, and keeps the receipts, until 95 % of them are in; then it is
killed. The second does what the same command would: it plans, learns what the index has, and hands out its
first task (*resume*); goes on to the end; says which candidate comes into which shard; and writes the
manifest. At last it looks at the store as `seedloom plan` and `pack` do (*survey*). The index lies in the
store, as real objects. Parts and scores do not: their listing is computed, a page of 1,000 names a call, and
nothing reads them. Memory is the peak of the whole process, with all that it imports.

**Devices.** The Ray runner with so many pretended GPUs and an actor on each, whose device sleeps for as long
as a unit takes, and which then waits for the store as a real one does. Nothing is computed, and the actors
import no torch, for the machine must hold them all. Selection, telemetry and index are the driver's own. A
device is busy while it sleeps; the rest of the time, from the first task to the last receipt, it waits for
the driver or for Ray.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import fsspec
import typer
from fsspec.implementations.local import LocalFileSystem

from jobs.benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    from pipeline.phases import Units
    from pipeline.tasks import Receipt, Task

CANDIDATES = (10**4, 10**5, 10**6, 10**7)
OF_STREAM = 10**4  # candidates of a class
UNIT = 16
PASSING = 0.6
KILLED = 0.95  # of the units, when the first driver is killed
LATENCY = 0.02  # seconds of a call of the store
PAGE = 1000  # names
IN_FLIGHT = 128  # units that are out at once in the bookkeeping
STORE_CALLS = 6  # of a unit on a worker: is it there, write and read the part and its scores
ROUNDS = 20  # units of a device
UNIT_SECONDS = (4.0, 1.0, 0.25)
TARGETS = {"busy": 0.9, "resume_seconds": 10.0, "peak_mb": 1000.0}


def scale(
    candidates: Annotated[list[int] | None, typer.Option(min=100, help="Sizes of the bookkeeping.")] = None,
    devices: Annotated[list[int] | None, typer.Option(min=1, help="Pretended devices; 64.")] = None,
    seconds: Annotated[
        list[float] | None, typer.Option(min=0.01, help="What a unit takes a device; 4, 1 and 0.25.")
    ] = None,
    latency: Annotated[float, typer.Option(min=0, help="Of a call of the store, in seconds.")] = LATENCY,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("scale.json"),
) -> None:
    """Plan, resume and pack up to ten million candidates; keep 64 pretended devices busy."""
    facts: dict[str, Any] = {
        "bookkeeping": [],
        "devices": [],
        "latency": latency,
        "unit": UNIT,
        "hardware": hardware(),
        "versions": versions("ray", "pyarrow", "numpy", "torch"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep(kind: str, found: dict[str, Any]) -> None:
        facts[kind].append(found)
        out.write_text(json.dumps(facts, indent=1) + "\n")  # what is measured is kept, whatever comes

    for count in candidates or CANDIDATES:
        keep("bookkeeping", bookkeeping(count, latency))
    for count in devices or [64]:
        for each in seconds or UNIT_SECONDS:
            keep("devices", keep_busy(count, each, latency))
    print(describe(facts))
    print(f"figures: {out}")


# --- a store that takes a while -----------------------------------------------------------------------------


class SlowStore(fsspec.AbstractFileSystem):
    """Local files behind a latency for every call, and parts and scores of which only the names are there."""

    protocol = "slow"
    cachable = False
    latency = LATENCY
    made: ClassVar[dict[str, int]] = {}  # stream → units that are there: 0, 1, …

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.disk = LocalFileSystem(auto_mkdir=True)

    def _wait(self, calls: int = 1) -> None:
        time.sleep(self.latency * calls)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._wait()
        return self.disk.cat_file(path, start, end)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._wait()
        self.disk.pipe_file(path, value, mode=mode)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self._wait()
        return self.disk.info(path)

    def rm_file(self, path: str) -> None:
        self._wait()
        self.disk.rm_file(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[str]:
        kind, _, stream = path.rpartition("/out/")[2].partition("/")
        if kind in ("parts", "scores"):
            count = self.made.get(stream.partition("/")[0], 0)
            self._wait(1 + count // PAGE)
            return [f"{path}/{unit:06d}.parquet" for unit in range(count)]
        self._wait()
        return self.disk.ls(path, detail=False)


# --- the bookkeeping ----------------------------------------------------------------------------------------


def bookkeeping(candidates: int, latency: float) -> dict[str, Any]:
    """What the driver takes for so many candidates."""
    with tempfile.TemporaryDirectory(prefix="seedloom-scale-") as folder:
        first = _in_a_process(_make, folder, candidates, latency)
        second = _in_a_process(_resume, folder, candidates, latency)
        segments = [p.stat().st_size for p in Path(folder, "out", "index").rglob("*.parquet")]
    index = {"segments": len(segments), "index_mb": sum(segments) / 1e6}
    return {"candidates": candidates, **first, **second, **index}


def _in_a_process(step: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What a step gives in a process of its own, so that its peak of memory is its own as well."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(step, given, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{step.__name__} failed; its error is above") from None
    finally:
        process.join()


def _answer(step: Callable[..., dict[str, Any]], given: Any, pipe: Connection) -> None:
    pipe.send(step(*given))


def _config(folder: str, candidates: int) -> Any:
    """A build that takes about so many candidates."""
    from pipeline.config import parse

    fsspec.register_implementation("slow", SlowStore, clobber=True)
    streams = max(1, candidates // OF_STREAM)
    return parse(
        {
            "output": f"slow://{folder}/out",
            "recipes": {"plain": {"generate": {"method": "text_to_image"}, "unit": UNIT, "batch": 8}},
            "targets": [
                {
                    "classes": [f"class {n:05d}" for n in range(streams)],
                    "accepted": round(candidates / streams * PASSING),
                    "attempts": 3,
                }
            ],
            "filter": [{"method": "clip", "margin": 0.0}],
        },
        "scale",
    )


class _Answers:
    """What devices would say: a share of the candidates passes, and no two units need be alike."""

    def __init__(self) -> None:
        self._chance = random.Random(0)
        outcomes, shares = ("passed", "clip.margin", "failed"), (PASSING, 0.99 - PASSING, 0.01)
        self._halves = [tuple(self._chance.choices(outcomes, shares, k=UNIT // 2)) for _ in range(1024)]

    def __call__(self, task: Any, seconds: float = 0.0) -> Receipt:
        from pipeline.tasks import UnitReceipt

        number = hash((int(task.stream[:12], 16), task.unit))  # of numbers, the same in every process
        outcomes = self._halves[number & 1023] + self._halves[number >> 10 & 1023]
        return UnitReceipt(outcomes, ENVIRONMENT, True, seconds, 100_000)

    def of_many(self, units: Units, until: int) -> int:
        """Let so many receipts come in, in another order than the units went out. Returns how many came."""
        out: list[Task] = []
        for done in range(until):
            while len(out) < IN_FLIGHT and (task := units.next()) is not None:
                out.append(task)
            if not out:
                return done
            at = self._chance.randrange(len(out))
            out[at], out[-1] = out[-1], out[at]
            task = out.pop()
            units.done(task, self(task))
        return until


ENVIRONMENT = json.dumps({"device": "cuda pretended", "precision": "bfloat16"})


class _Clock:
    """Seconds of steps, by name."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.start()

    def start(self) -> None:
        self._begin = time.monotonic()

    def lap(self, name: str) -> None:
        self.facts[f"{name}_seconds"] = time.monotonic() - self._begin
        self.start()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _make(folder: str, candidates: int, latency: float) -> dict[str, Any]:
    """The driver from the beginning until it is killed."""
    from pipeline.build import blank, resolve
    from pipeline.index import Index
    from pipeline.ledger import existing
    from pipeline.phases import Units
    from pipeline.telemetry import PlainLines

    SlowStore.latency = latency
    config = _config(folder, candidates)
    imported, clock, telemetry = _peak_mb(), _Clock(), PlainLines()
    store, plan = resolve(config)
    assert existing(store, plan) is None
    clock.lap("plan")
    streams, index = blank(plan), Index(store, plan, telemetry.say)
    index.teach(streams)
    units = Units(plan, streams, index.add, telemetry)
    index.__enter__()  # and never left: it is killed
    telemetry.phase(f"{candidates} candidates", units.remaining())
    clock.lap("begin")
    begin = time.process_time()
    done = _Answers().of_many(units, int(KILLED * candidates / UNIT))
    clock.facts["make_cpu_seconds"] = time.process_time() - begin
    clock.lap("make")
    index._thread.shutdown()  # what it has begun to write, nothing else
    return {
        **clock.facts, "streams": len(streams), "units_made": done, "imports_mb": imported,
        "make_peak_mb": _peak_mb(),
    }  # fmt: skip


def _resume(folder: str, candidates: int, latency: float) -> dict[str, Any]:
    """The same command again, to the end."""
    from pipeline.build import blank, resolve, survey
    from pipeline.index import Index
    from pipeline.ledger import existing, write_manifest
    from pipeline.pack import plan_shards
    from pipeline.phases import Units
    from pipeline.tasks import ShardReceipt
    from pipeline.telemetry import PlainLines

    SlowStore.latency = latency
    config = _config(folder, candidates)
    clock, telemetry = _Clock(), PlainLines()
    store, plan = resolve(config)
    assert existing(store, plan) is None
    clock.lap("replan")
    streams, index = blank(plan), Index(store, plan, telemetry.say)
    index.teach(streams)
    units = Units(plan, streams, index.add, telemetry)
    known, first = sum(len(stream.units()) for stream in streams.values()), units.next()
    clock.lap("learn")
    resume_peak = _peak_mb()
    assert first is not None
    with index:
        telemetry.phase(f"{candidates} candidates, resumed", units.remaining())
        answers = _Answers()
        units.done(first, answers(first))
        answers.of_many(units, candidates)
    clock.lap("finish")
    selections = {name: stream.select() for name, stream in streams.items()}
    clock.lap("select")
    shards, tasks, size = [], 0, 0
    for task in plan_shards(plan, selections):
        tasks, size = tasks + 1, max(size, sum(len(rows) for rows in task.shards))
        shards += [
            ShardReceipt(f"{task.first + n:06d}", len(rows), 10**8, "0" * 64, 10**6, "0" * 64)
            for n, rows in enumerate(task.shards)
        ]
    clock.lap("pack")
    manifest = write_manifest(store, plan, selections, {}, shards, {})
    clock.lap("manifest")
    peak = _peak_mb()
    SlowStore.made.update({name: len(stream.units()) for name, stream in streams.items()})
    clock.start()
    seen = survey(store, plan, telemetry.say)
    clock.lap("survey")
    assert all(seen.streams[name].tally() == stream.tally() for name, stream in streams.items())
    assert manifest.shortfall == 0
    return {
        **clock.facts, "units_known": known, "units": sum(s.units for s in selections.values()),
        "samples": manifest.samples, "shards": len(shards), "resume_peak_mb": resume_peak, "peak_mb": peak,
        "survey_peak_mb": _peak_mb(),
    }  # fmt: skip


# --- the devices --------------------------------------------------------------------------------------------


class PretendedDevice:
    """What an actor of the Ray runner is, with a device that sleeps."""

    def setup(self, times: tuple[float, float], uri: str) -> str:
        self.seconds, self.latency = times
        self._device, self._answers = threading.Lock(), _Answers()
        return ""  # on no node that could go

    def run(self, task: Any) -> Any:
        with self._device:
            time.sleep(self.seconds)
        time.sleep(self.latency * STORE_CALLS)
        return self._answers(task, self.seconds)


class _Some:
    """The first so many units of a work."""

    def __init__(self, work: Units, count: int):
        self._work, self._left = work, count
        self.done, self.killed = work.done, work.killed

    def next(self) -> Task | None:
        self._left -= 1
        return self._work.next() if self._left >= 0 else None


def keep_busy(devices: int, seconds: float, latency: float) -> dict[str, Any]:
    """What share of the time so many devices work."""
    with tempfile.TemporaryDirectory(prefix="scale", dir="/tmp") as folder:  # short: sockets lie below it
        return _in_a_process(_keep_busy, folder, devices, seconds, latency)


def _keep_busy(folder: str, devices: int, seconds: float, latency: float) -> dict[str, Any]:
    import logging

    import ray

    from jobs.benchmarks import scale as importable  # under the name that an actor finds it by
    from pipeline.build import blank, resolve
    from pipeline.index import Index
    from pipeline.phases import Units
    from pipeline.run_ray import RayRunner
    from pipeline.telemetry import PlainLines

    class Runner(RayRunner):
        actor = importable.PretendedDevice

        def given(self) -> Any:
            return seconds, latency  # not the plan, or the actors would import torch

    rounds = max(ROUNDS, round(20 / seconds))
    SlowStore.latency = latency
    store, plan = resolve(_config(folder, 4 * devices * rounds * UNIT))
    telemetry, begin = PlainLines(), time.monotonic()
    # Ray prints that it wonders at so many actors on so few cores
    with contextlib.redirect_stdout(io.StringIO()):
        ray.init(
            num_gpus=devices, num_cpus=1, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, object_store_memory=100 * 2**20, _temp_dir=f"{folder}/ray",
        )  # fmt: skip
        try:
            with Runner(plan, "") as runner, Index(store, plan, telemetry.say) as index:
                while not all(seat.up for seat in runner.seats):
                    runner.seat_those_of(ray.wait([s.loading for s in runner.seats if not s.up])[0])
                start = time.monotonic() - begin
                units = Units(plan, blank(plan), index.add, telemetry)
                telemetry.phase(f"{devices} devices, {seconds:g} s a unit", units.remaining())
                begin, cpu = time.monotonic(), time.process_time()
                runner.run(_Some(units, devices * rounds))
                wall, cpu = time.monotonic() - begin, time.process_time() - cpu
        finally:
            ray.shutdown()
    assert units.generated == devices * rounds
    return {
        "devices": devices, "unit_seconds": seconds, "units": units.generated,
        "busy_share": units.busy_seconds / (wall * devices), "seconds": wall, "start_seconds": start,
        "driver_cpu_ms_of_a_unit": cpu / units.generated * 1000, "driver_peak_mb": _peak_mb(),
    }  # fmt: skip


# --- the report ---------------------------------------------------------------------------------------------


def describe(facts: dict[str, Any]) -> str:
    """The figures as Markdown."""
    from jobs.benchmarks.turns import table

    sections: list[str] = []
    rows: list[tuple[str, ...]] = []
    for b in facts["bookkeeping"]:
        resume = b["replan_seconds"] + b["learn_seconds"]
        rows.append(
            (
                f"{b['candidates']:.0e}".replace("e+0", "e"), f"{b['units']:,}", str(b["streams"]),
                f"{b['plan_seconds']:.2f}", f"{b['make_cpu_seconds'] / b['units_made'] * 1e6:.0f}",
                f"{b['make_seconds'] / b['units_made'] * 1e6:.0f}",
                f"{resume:.2f}", f"{b['learn_seconds'] / b['units'] * 1e6:.1f}",
                f"{b['pack_seconds']:.2f}", f"{b['pack_seconds'] / b['units'] * 1e6:.1f}",
                f"{b['survey_seconds']:.1f}", f"{b['segments']} / {b['index_mb']:.2f}",
                f"{b['make_peak_mb']:.0f}", f"{b['resume_peak_mb']:.0f}", f"{b['peak_mb']:.0f}",
            )
        )  # fmt: skip
    if rows:
        heads = (
            "candidates", "units", "classes", "plan s", "receipt: CPU µs a unit", "in all", "resume s",
            "learn µs a unit", "pack s", "pack µs a unit", "survey s", "index objects / MB", "peak MB: make",
            "resume", "pack",
        )  # fmt: skip
        last = facts["bookkeeping"][-1]
        resume = last["replan_seconds"] + last["learn_seconds"]
        peak = max(last["make_peak_mb"], last["peak_mb"])
        sections += [
            table(heads, rows),
            f"Resume of {last['candidates']:,}: {resume:.1f} s, target {TARGETS['resume_seconds']:g} s"
            f" {_met(resume < TARGETS['resume_seconds'])}; peak of the driver {peak:.0f} MB, of which"
            f" {last['imports_mb']:.0f} are there after imports, target {TARGETS['peak_mb']:g} MB"
            f" {_met(peak < TARGETS['peak_mb'])}.",
        ]
    lines = [
        (
            str(d["devices"]), f"{d['unit_seconds']:g}", str(d["units"]), f"{d['busy_share']:.1%}",
            _met(d["busy_share"] >= TARGETS["busy"]), f"{d['units'] / d['seconds']:.1f}",
            f"{d['driver_cpu_ms_of_a_unit']:.2f}", f"{d['start_seconds']:.0f}", f"{d['driver_peak_mb']:.0f}",
        )
        for d in facts["devices"]
    ]  # fmt: skip
    if lines:
        names = (
            "devices", "s a unit", "units", "busy", f"target {TARGETS['busy']:.0%}", "units/s",
            "driver CPU ms a unit", "start s", "driver peak MB",
        )  # fmt: skip
        sections.append(table(names, lines))
    libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    sections.append(
        f"A call of the store takes {facts['latency'] * 1000:g} ms; units of {facts['unit']};"
        f" {facts['hardware']}; {libraries}; {facts['date']}"
    )
    return "\n\n".join(sections)


def _met(reached: bool) -> str:
    return "reached" if reached else "MISSED"


if __name__ == "__main__":
    from jobs.entry import run

    run(scale)
