"""A build, from its config to its manifest; and packing what exists without generating.

    references.lock ─► plan ─► invert ─► prepare ─► units until selection is final ─► pack ─► manifest

Every step looks first at what is there, so the same call finishes what a crash left, extends what a changed
config asks for, or finds that there is nothing to do.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline import pack, parts
from pipeline.batches import decided, undecided
from pipeline.config import BuildConfig
from pipeline.goals import settle
from pipeline.lease import PRUNE, Lease
from pipeline.ledger import commit_inputs, existing, record, write_manifest
from pipeline.phases import Inversions, ListWork, Units, tallies
from pipeline.plan import Plan, make_plan
from pipeline.references import keep, scan
from pipeline.seeds import assess, load_seeds, remark, seed_name
from pipeline.select import Selection, Stream
from pipeline.store import Store
from pipeline.tasks import (
    AssessTask,
    BatchTask,
    Done,
    InvertTask,
    PrepareTask,
    Receipt,
    Runner,
    SeedsReceipt,
    ShardReceipt,
    Task,
    Work,
)
from pipeline.telemetry import Telemetry
from schemas.errors import Interrupted
from schemas.manifest import Manifest
from schemas.records import Reference
from schemas.sealed import seal

Run = Callable[[Work], None]


@dataclass
class State:
    """What the store holds for a plan."""

    streams: dict[str, Stream]
    environments: dict[str, dict[int, str]]  # stream → unit → environment of its part
    generated: dict[str, set[int]]  # stream → units whose part exists, scored or not

    def selections(self) -> dict[str, Selection]:
        return {name: stream.select() for name, stream in self.streams.items()}


@dataclass(frozen=True)
class Result:
    manifest: Manifest
    folder: str
    made: bool  # false: there was nothing to do
    seconds: dict[str, float] = field(default_factory=dict)
    units: int = 0
    busy_share: float | None = None


def resolve(config: BuildConfig) -> tuple[Store, Plan]:
    """Look at the references and plan. Writes nothing."""
    store = Store(config.output)
    lock = scan(config.references, store)
    return store, make_plan(decided(settle(config, lock), store), lock)


def survey(store: Store, plan: Plan) -> State:
    """What is committed of each stream: receipts are read from parts and scores, nothing is computed."""
    state = State({}, {}, {})
    for stream in plan.streams:
        known = Stream(stream.quota, stream.max_units, stream.unit)
        environments: dict[int, str] = {}
        found = {int(n.removesuffix(".parquet")) for n in store.list(f"parts/{stream.id}")}
        for unit in sorted(found):
            if unit < stream.max_units and (account := parts.account(store, stream, unit)):
                known.outcomes[unit] = account.outcomes
                environments[unit] = account.environment
        state.streams[stream.id] = known
        state.environments[stream.id] = environments
        state.generated[stream.id] = found
    return state


def build(config: BuildConfig, telemetry: Telemetry, make_runner: Callable[[Plan, str], Runner]) -> Result:
    """Make the dataset, or what is missing of it. Raises `UserError`, `Interrupted`."""
    started = time.time()
    store, plan = resolve(config)
    if undecided(plan):
        _choose_batches(store, plan, telemetry, make_runner)
        store, plan = resolve(config)
    if manifest := existing(store, plan):
        record(store, manifest)
        return Result(manifest, plan.build_folder, made=False)
    store.probe()
    seconds: dict[str, float] = {}
    lease = lease_of(store, plan)
    lease.demand_free()
    state = survey(store, plan)
    units = Units(plan, state.streams, state.environments, telemetry)

    def timed(name: str, step: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        value = step()
        seconds[name] = round(time.monotonic() - begin, 3)
        return value

    with contextlib.ExitStack() as held:
        try:
            telemetry.say(f"build {plan.build_id}: starting workers")
            runner = make_runner(plan, config.output)
            timed("start", runner.__enter__)
            try:
                # the workers are up, so models and config agree: from here on things are written
                held.enter_context(lease)
                run = lease.guard(runner.run)
                keep(config.references, store, plan.used_references())
                commit_inputs(store, plan)
                absent = _inversions(store, plan)
                timed("invert", lambda: _run_list(run, telemetry, "invert", absent, Inversions))
                seeds = timed("assess", lambda: _assess(run, telemetry, plan))
                timed("prepare", lambda: _run_list(run, telemetry, "prepare", _preparations(store, plan)))
                if todo := units.remaining():
                    telemetry.phase("generate", todo)
                    telemetry.tallies(tallies(plan, state.streams))
                    timed("generate", lambda: run(units))
                selections = state.selections()
                tasks = pack.plan_shards(plan, selections)
                shards: list[ShardReceipt] = timed("pack", lambda: _pack(run, telemetry, tasks))
            finally:
                runner.__exit__()
        except KeyboardInterrupt:
            done = sum(t.accepted for t in tallies(plan, state.streams).values())
            raise Interrupted(
                f"stopped; nothing is lost ({done} images accepted so far). Run the same command again to"
                " go on"
            ) from None
        manifest = write_manifest(store, plan, selections, state.environments, seeds, shards)
        busy = seconds.get("generate", 0) * runner.workers
        result = Result(
            manifest, plan.build_folder, True, seconds, units.generated,
            round(units.busy_seconds / busy, 4) if busy else None,
        )  # fmt: skip
        _write_run(store, plan, result, runner, started)
    return result


def lease_of(store: Store, plan: Plan) -> Lease:
    """What the run holds that makes this build. No build begins while the store is pruned."""
    return Lease(store, f"build-{plan.build_id}", plan.config.run.heartbeat, beside=PRUNE)


def repack(config: BuildConfig, telemetry: Telemetry) -> Result | dict[str, int]:
    """Select from what exists and pack it. Generates nothing.

    Returns the result, or target → missing images when what exists does not suffice; then nothing is written.
    """
    store, plan = resolve(config)
    if manifest := existing(store, plan):
        record(store, manifest)
        return Result(manifest, plan.build_folder, made=False)
    state = survey(store, plan)
    selections = state.selections()
    short: dict[str, int] = {}
    for stream in plan.streams:
        selection = selections[stream.id]
        if not selection.final:
            # what an unknown unit holds decides about all that come after it
            certain = sum(unit < selection.unknown[0] for unit, _ in selection.accepted)
            short[stream.target] = short.get(stream.target, 0) + stream.quota - certain
    if short:
        return short
    store.probe()
    with lease_of(store, plan) as lease:
        commit_inputs(store, plan)
        shards: list[ShardReceipt] = []
        tasks = pack.plan_shards(plan, selections)
        telemetry.phase("pack", sum(len(task.shards) for task in tasks))
        for task in tasks:
            lease.check()
            shards += pack.write_shards(store, plan, task)
            telemetry.advance(len(task.shards))
        combining = [s for s in plan.streams if s.seeds]
        seeds = {s.id: assess(s, config.recipes[s.recipe], load_seeds(store, s)) for s in combining}
        manifest = write_manifest(store, plan, selections, state.environments, seeds, shards)
    return Result(manifest, plan.build_folder, made=True)


def _choose_batches(
    store: Store, plan: Plan, telemetry: Telemetry, make_runner: Callable[[Plan, str], Runner]
) -> None:
    """Let workers of the provisional plan commit the batches that it waits for."""
    store.probe()
    streams = undecided(plan)
    telemetry.say(f"batch auto: trying what fits for {', '.join(sorted(streams))}")
    try:
        with make_runner(plan, plan.config.output) as runner:
            keep(plan.config.references, store, plan.used_references())
            _run_list(runner.run, telemetry, "batch", [BatchTask(stream.id) for stream in streams.values()])
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing is lost. Run the same command again to go on") from None


def _run_list(
    run: Run, telemetry: Telemetry, name: str, tasks: list[Task], kind: type[ListWork] = ListWork
) -> None:
    if not tasks:
        return

    def received(task: Task, receipt: Receipt) -> None:
        assert isinstance(receipt, Done)
        telemetry.advance(receipt.items)

    total = sum(len(t.references) if isinstance(t, InvertTask) else 1 for t in tasks)
    telemetry.phase(name, total)
    run(kind(tasks, received))


def _assess(run: Run, telemetry: Telemetry, plan: Plan) -> dict[str, SeedsReceipt]:
    """What there is to know of the seeds of every stream that combines some."""
    found: dict[str, SeedsReceipt] = {}

    def received(task: Task, receipt: Receipt) -> None:
        assert isinstance(task, AssessTask)
        assert isinstance(receipt, SeedsReceipt)
        found[task.stream] = receipt

    run(ListWork([AssessTask(s.id) for s in plan.streams if s.seeds], received))
    for stream in plan.streams:
        if stream.id in found and (text := remark(stream.name, found[stream.id])):
            telemetry.say(text)
    return found


def _inversions(store: Store, plan: Plan) -> list[Task]:
    """Device batches of references whose seeds are missing; one image is inverted once per prompt."""
    tasks: list[Task] = []
    seen: set[str] = set()
    for stream in plan.streams:
        if stream.seeds is None or stream.seeds in seen:
            continue
        seen.add(stream.seeds)
        absent = [r for r in stream.references if not store.exists(seed_name(stream.seeds, r))]
        tasks += [InvertTask(stream.id, tuple(batch)) for batch in _batches(absent, stream.batch)]
    return tasks


def _batches(references: list[Reference], size: int) -> Iterable[list[Reference]]:
    return (references[i : i + size] for i in range(0, len(references), size))


def _preparations(store: Store, plan: Plan) -> list[Task]:
    from pipeline.worker import artifact_name

    wanted = {artifact: (s.id, kind) for s in plan.streams for kind, artifact in s.artifacts.items()}
    return [
        PrepareTask(stream, kind)
        for artifact, (stream, kind) in wanted.items()
        if not store.exists(artifact_name(artifact))
    ]


def _pack(run: Run, telemetry: Telemetry, tasks: list[pack.PackTask]) -> list[ShardReceipt]:
    shards: list[ShardReceipt] = []

    def received(task: Task, receipt: Receipt) -> None:
        assert isinstance(receipt, tuple)
        shards.extend(receipt)
        telemetry.advance(len(receipt))

    telemetry.phase("pack", sum(len(task.shards) for task in tasks))
    run(ListWork(tasks, received))
    return shards


def _write_run(store: Store, plan: Plan, result: Result, runner: Runner, started: float) -> None:
    """Times and hosts: what differs between two runs of one build, and nothing else depends on."""
    facts = {
        "build_id": plan.build_id,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": result.seconds,
        "units_generated": result.units,
        "busy_share": result.busy_share,
        "workers": runner.workers,
        "restarts": getattr(runner, "restarts", 0),
        "retries": getattr(runner, "retries", 0),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "run": plan.config.run.model_dump(mode="json"),
        "references": getattr(plan.config.references, "uri", None),
    }
    store.put(f"{plan.build_folder}/run.json", seal(facts))
