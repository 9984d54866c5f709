"""`seedloom benchmark overhead`: what Ray, units and receipts cost, beside a bare loop over the same stages.

Two pools of the same number of workers are started once and then take turns, A B, B A, A B, …, so that a
machine that grows slower or faster weighs on both alike. In a turn each pool makes the same number of units.

- Ray: the build's own runner. Units are fed by the driver; a worker combines, generates, encodes, commits the
  part to a local folder, reads it back, scores it, commits the scores, and sends a receipt.
- Bare: plain processes with the same models and the same Dag objects. Each combines, generates, encodes and
  scores its share batch by batch in a `for` loop. No Ray, no driver, no files, no receipts, no retries.
  They run at the niceness that Ray gives to its workers.

Several `--workers` or `--unit` are measured one after another, each combination with pools of its own.

A turn's time runs from its first task to the last result, so both pools pay for workers that wait at the end
for the slowest. The idle share is the time in which no thread of a Ray worker held the device.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    from pipeline.plan import Plan, StreamPlan
    from pipeline.tasks import Receipt, Task

TARGET = 0.95
NICENESS = 15  # Ray's for its workers; without it the bare loop would win on a busy machine by priority
CLASS = "hexagon"
BATCH = 8


def overhead(
    minutes: Annotated[float, typer.Option(help="Measured time of each of the two, in minutes.")] = 5.0,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="Workers of each pool; 0: one for each core or GPU.")
    ] = None,
    unit: Annotated[
        list[int] | None, typer.Option(min=BATCH, help=f"Candidates in a unit, a multiple of {BATCH}; 16.")
    ] = None,
    turns: Annotated[int, typer.Option(min=2, help="Into so many turns the time of each is cut.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps of an image; fewer make overhead show.")] = 20,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("overhead.json"),
) -> None:
    """Compare images/s of the Ray runner with a bare loop over the same stages.

    Give --workers and --unit several times to compare every combination.
    """
    cases = []
    for count, size in itertools.product(workers or [0], unit or [16]):
        with tempfile.TemporaryDirectory(prefix="seedloom-overhead-") as folder:
            cases.append(measure(Path(folder), minutes * 60, count, turns, steps, size))
        print(describe(cases[-1]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(cases if len(cases) > 1 else cases[0], indent=1) + "\n")
    print(f"figures: {out}")


def measure(folder: Path, seconds: float, workers: int, turns: int, steps: int, unit: int) -> dict[str, Any]:
    import torch

    from pipeline.build import resolve
    from pipeline.config import parse
    from pipeline.references import keep
    from pipeline.run_ray import RayRunner

    gpus = torch.cuda.device_count()
    workers = workers or gpus or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = "1"  # for the bare processes; the runner sees to its own
    config = parse(_config(folder, workers, gpus, steps, unit), "overhead")
    store, plan = resolve(config)
    (stream,) = plan.streams
    keep(config.references, store, plan.used_references())
    load_before = os.getloadavg()[0]

    runner = RayRunner(plan, config.output)
    ray_start = _timed(runner.__enter__)
    try:
        _invert(runner, stream)
        bare = _Bare(plan, config.output, workers, gpus)
        bare_start = _timed(bare.start)
        try:
            ray_units = _RayUnits(runner, stream)
            _timed(lambda: ray_units.make(workers))  # warm up: text is embedded, memory is allocated
            _timed(lambda: bare.make(1))
            each = max(1, round(seconds / turns / _timed(lambda: bare.make(2)) * 2))
            ray_seconds, bare_seconds = [], []
            ray_units.device_seconds = 0.0
            for turn in range(turns):
                for ours in (True, False) if turn % 2 == 0 else (False, True):
                    if ours:
                        ray_seconds.append(_timed(lambda: ray_units.make(each * workers)))
                    else:
                        bare_seconds.append(_timed(lambda: bare.make(each)))
        finally:
            bare.end()
    finally:
        runner.__exit__()

    images = each * workers * stream.unit
    ratio, low, high = _ratio(bare_seconds, ray_seconds)
    return {
        "ratio": round(ratio, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "target": TARGET,
        "idle_share": round(1 - ray_units.device_seconds / (sum(ray_seconds) * workers), 4),
        "ray_images_per_second": round(images * turns / sum(ray_seconds), 3),
        "bare_images_per_second": round(images * turns / sum(bare_seconds), 3),
        "turns": turns,
        "images_per_turn": images,
        "ray_seconds": [round(s, 3) for s in ray_seconds],
        "bare_seconds": [round(s, 3) for s in bare_seconds],
        "start_seconds": {"ray": round(ray_start, 2), "bare": round(bare_start, 2)},
        "workers": workers,
        "retries": runner.retries,
        "restarts": runner.restarts,
        "steps": steps,
        "unit": stream.unit,
        "batch": stream.batch,
        "load_before": round(load_before, 2),
        "hardware": hardware(),
        "versions": versions("ray", "torch"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(facts: dict[str, Any]) -> str:
    """The figures in words."""
    low, high = facts["interval_95"]
    start, load = facts["start_seconds"], facts["load_before"]
    shown = "MISSED" if high < facts["target"] else "not shown either way"
    verdict = "reached" if low >= facts["target"] else shown
    lines = [
        f"Ray / bare: {facts['ratio']:.3f} (95 % interval {low:.3f} to {high:.3f} over {facts['turns']} pairs"
        f" of turns); target {facts['target']}: {verdict}",
        f"images/s: Ray {facts['ray_images_per_second']}, bare {facts['bare_images_per_second']};"
        f" {facts['images_per_turn']} images a turn, {sum(facts['ray_seconds']) / 60:.1f} min of Ray and"
        f" {sum(facts['bare_seconds']) / 60:.1f} min of bare in all",
        f"idle share of a Ray worker: {facts['idle_share']:.1%}",
        f"start-up, not counted above: Ray {start['ray']} s, bare {start['bare']} s",
        f"{facts['workers']} workers, {facts['steps']} steps, unit {facts['unit']}, batch {facts['batch']};"
        f" {facts['hardware']}; load before the start {load}",
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    ]
    return "\n".join(lines)


def _config(folder: Path, workers: int, gpus: int, steps: int, unit: int) -> dict[str, Any]:
    from jobs.tangram.drawings import write_references

    write_references(folder / "references", [CLASS], per_class=4)
    return {
        "output": str(folder / "out"),
        "references": {"uri": str(folder / "references")},
        "recipes": {
            "mixed": {
                "combine": {"method": "cog"},
                "generate": {"method": "text_to_image", "steps": steps, "guidance": 4.0},
                "unit": unit,
                "batch": BATCH,
            }
        },
        "targets": [{"classes": [CLASS], "accepted": 1}],
        "filter": [{"method": "clip", "margin": 0.0}],
        "run": {"workers": workers, "gpus_per_worker": min(1.0, gpus / workers) if gpus else 1},
    }


def _timed(step: Any) -> float:
    begin = time.monotonic()
    step()
    return time.monotonic() - begin


def _ratio(bare: list[float], ray: list[float]) -> tuple[float, float, float]:
    """Geometric mean of bare/Ray time over the pairs of turns, with Student's 95 % interval."""
    from scipy import stats

    logs = [math.log(b / r) for b, r in zip(bare, ray, strict=True)]
    mean = statistics.fmean(logs)
    half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


# --- the Ray side ------------------------------------------------------------------------------------------


def _invert(runner: Any, stream: StreamPlan) -> None:
    from pipeline.phases import ListWork
    from pipeline.tasks import InvertTask

    runner.run(ListWork([InvertTask(stream.id, stream.references)], lambda task, receipt: None))


@dataclass
class _RayUnits:
    """Makes units with the runner; a `Work` of its own for each call."""

    runner: Any
    stream: StreamPlan
    device_seconds: float = 0.0
    made: int = 0
    _left: int = field(default=0, init=False)

    def make(self, units: int) -> None:
        self._left = units
        self.runner.run(self)

    def next(self) -> Task | None:
        from pipeline.tasks import UnitTask

        if not self._left:
            return None
        self._left, self.made = self._left - 1, self.made + 1
        return UnitTask(self.stream.id, self.made - 1)

    def done(self, task: Task, receipt: Receipt) -> None:
        from pipeline.tasks import UnitReceipt

        if not isinstance(receipt, UnitReceipt) or not receipt.generated:
            raise RuntimeError(f"{task} was not made: {receipt}")
        self.device_seconds += receipt.seconds

    def killed(self, task: Task) -> None:
        raise RuntimeError(f"{task} ends its worker")


# --- the bare side -----------------------------------------------------------------------------------------


class _Bare:
    """Plain processes, each with models of its own, told by a pipe how many units to make."""

    def __init__(self, plan: Plan, uri: str, workers: int, gpus: int):
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(workers):
            here, there = context.Pipe()
            self.pipes.append(here)
            arguments = (plan, uri, rank, str(rank % gpus) if gpus else "", there)
            self.processes.append(context.Process(target=_loop, args=arguments, daemon=True))

    def start(self) -> None:
        for process in self.processes:
            process.start()
        self._answers()

    def make(self, units: int) -> None:
        """So many units by every process."""
        for pipe in self.pipes:
            pipe.send(units)
        self._answers()

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with suppress(OSError):
                pipe.send(0)
            process.join()

    def _answers(self) -> None:
        for pipe in self.pipes:
            pipe.recv()


def _loop(plan: Plan, uri: str, rank: int, gpu: str, pipe: Connection) -> None:
    """A bare worker: for each unit, its batches; for each batch, the stages; then the scores."""
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    from pipeline.dag import in_batches, score
    from pipeline.worker import Worker

    os.nice(NICENESS)
    worker = Worker(plan, uri)
    import torch

    torch.set_num_threads(1)
    (stream,) = plan.streams
    (chosen,) = stream.filters
    dag, materials = worker.dags[stream.recipe], worker.materials(stream.id)
    unit = rank * 10**6  # others than any other process makes
    pipe.send("ready")
    while count := pipe.recv():
        for _ in range(count):
            encoded: list[bytes | None] = []
            for batch in in_batches(range(unit * stream.unit, (unit + 1) * stream.unit), stream.batch):
                made = dag.run(stream, materials, list(batch))
                encoded += [getattr(made[i], "image", None) for i in batch]
            score(stream, worker.models, encoded, chosen.method)
            unit += 1
        pipe.send("done")


if __name__ == "__main__":
    from jobs.entry import run

    run(overhead)
