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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial, reduce
from typing import Any

import numpy as np

from pipeline import distinct, pack, parts
from pipeline.batches import decided, undecided
from pipeline.config import BuildConfig
from pipeline.goals import settle
from pipeline.index import Index
from pipeline.lease import PRUNE, Lease
from pipeline.ledger import commit_inputs, existing, record, write_manifest
from pipeline.phases import Inversions, ListWork, Units, tallies
from pipeline.plan import Plan, StreamPlan, make_plan
from pipeline.references import held_out_sets, keep, scan_all, set_name
from pipeline.seeds import assess, load_seeds, remark, seed_name
from pipeline.select import Selection, Stream
from pipeline.store import Store, side_by_side
from pipeline.tasks import (
    AssessTask,
    BatchTask,
    Done,
    InvertTask,
    Outdated,
    PrepareTask,
    Receipt,
    Runner,
    SeedsReceipt,
    ShardReceipt,
    Task,
    Work,
)
from pipeline.telemetry import Telemetry
from pipeline.tensors import artifact_name
from schemas.errors import Interrupted, UserError
from schemas.manifest import Manifest
from schemas.records import Reference
from schemas.sealed import seal

Run = Callable[[Work], None]


@dataclass
class State:
    """What the store holds for a plan."""

    streams: dict[str, Stream]
    generated: dict[str, np.ndarray]  # stream → units whose part exists, scored or not, ascending

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
    lock = scan_all(config, store)
    return store, make_plan(decided(settle(config, lock), store), lock)


def blank(plan: Plan) -> dict[str, Stream]:
    """The streams of a plan, of which nothing is known yet."""
    return distinct.make_streams(plan)


def survey(store: Store, plan: Plan, say: Callable[[str], None]) -> State:
    """What is committed of each stream, seen without workers.

    The index is believed as far as parts and scores are there; those that it lacks are read. A build has no
    need of it: it asks workers for what the index does not know, and they find what is there.
    """
    state = State(blank(plan), {})
    Index(store, plan, say).teach(state.streams)

    def look(stream: StreamPlan) -> tuple[np.ndarray, np.ndarray]:
        folders = [f"parts/{stream.id}", *(f"scores/{stream.id}/{f.id}" for f in stream.filters)]
        units = [
            np.array(sorted(int(name.removesuffix(".parquet")) for name in store.list(folder)), np.int64)
            for folder in folders
        ]
        return units[0], reduce(np.intersect1d, units)

    unread: list[tuple[StreamPlan, int]] = []
    for stream, (parts_there, scored) in zip(plan.streams, side_by_side(look, plan.streams), strict=True):
        known = state.streams[stream.id]
        if len(gone := np.setdiff1d(known.units(), scored)):
            known.forget(gone)
        new = np.setdiff1d(scored, known.units())
        unread += [(stream, unit) for unit in new.tolist() if unit < stream.max_units]
        state.generated[stream.id] = parts_there
    _read(store, state.streams, unread)
    return state


def _read(store: Store, streams: Mapping[str, Stream], units: Sequence[tuple[StreamPlan, int]]) -> None:
    """Learn of units from their parts and scores."""
    unready = set[str]()
    for compared in distinct.distincts(streams):
        try:
            compared.load(store)
        except FileNotFoundError:
            unready |= compared.streams.keys()  # as if nothing were scored: the build makes what is lacking
    units = [(stream, unit) for stream, unit in units if stream.id not in unready]
    accounts = side_by_side(lambda unit: parts.account(store, *unit), units)
    for (stream, unit), account in zip(units, accounts, strict=True):
        if account:
            learned = (unit, account.outcomes, account.environment, account.signatures)
            streams[stream.id].learn(*learned)


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
    runner = make_runner(plan, config.output)
    telemetry = runner.watch(telemetry)
    streams = blank(plan)
    index = Index(store, plan, telemetry.say)
    index.teach(streams)
    units = Units(plan, streams, index.add, telemetry)

    def timed(name: str, step: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        value = step()
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - begin, 3)
        return value

    with contextlib.ExitStack() as held:
        try:
            telemetry.say(f"build {plan.build_id}: starting workers", build=plan.build_id)
            runner.expected = units.remaining()
            timed("start", runner.__enter__)
            try:
                # the workers are up, so models and config agree: from here on things are written
                held.enter_context(lease)
                run = lease.guard(runner.run)
                _keep_all(store, plan)
                commit_inputs(store, plan)
                absent = _inversions(store, plan)
                timed("invert", lambda: _run_list(run, telemetry, "invert", absent, Inversions))
                seeds = timed("assess", lambda: _assess(run, telemetry, plan))
                timed("prepare", lambda: _run_list(run, telemetry, "prepare", _preparations(store, plan)))
                for compared in distinct.distincts(streams):
                    compared.load(store)
                with index:
                    selections, shards = _generate_and_pack(run, units, index, timed)
            finally:
                runner.__exit__()
        except KeyboardInterrupt:
            done = sum(stream.tally().accepted for stream in streams.values())
            raise Interrupted(
                f"stopped; nothing is lost ({done} images accepted so far). Run the same command again to"
                " go on"
            ) from None
        files = _duplicates(plan, streams, selections, telemetry)
        manifest = write_manifest(store, plan, selections, seeds, shards, files)
        available = runner.worker_seconds
        result = Result(
            manifest, plan.build_folder, True, seconds, units.generated,
            round(units.busy_seconds / available, 4) if available else None,
        )  # fmt: skip
        _write_run(store, plan, result, runner, started, units.of_stream)
    return result


def _generate_and_pack(
    run: Run, units: Units, index: Index, timed: Callable[[str, Callable[[], Any]], Any]
) -> tuple[dict[str, Selection], list[ShardReceipt]]:
    """Units until selection is final, and its shards; once more when the index was wrong about some units."""
    plan, streams, telemetry = units.plan, units.streams, units.telemetry
    outdated: set[tuple[str, int]] = set()
    while True:
        telemetry.tallies(tallies(plan.streams, streams))
        if todo := units.remaining():
            telemetry.phase("generate", todo)
            timed("generate", lambda: run(units))
        selections = {name: stream.select() for name, stream in streams.items()}
        shards, gone = timed("pack", partial(_pack, run, telemetry, plan, selections))
        if not gone:
            return selections, shards
        for name, unit in gone & outdated:
            part = f"{index.store.uri}/{parts.part_name(plan.by_id[name], unit)}"
            raise UserError(
                f"{part}: it or its scores change during the build; leave them alone, build again"
            )
        telemetry.say(f"{len(gone)} units are not as the index has them: they are looked at again")
        index.forget(gone)
        units.forget(gone)
        outdated |= gone


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

    def here(work: Work) -> None:
        while (task := work.next()) is not None:
            assert isinstance(task, pack.PackTask)
            work.done(task, pack.write_shards(store, plan, task))

    streams = survey(store, plan, telemetry.say).streams
    selections = {name: stream.select() for name, stream in streams.items()}
    if short := _short(plan, selections):
        return short
    store.probe()
    with lease_of(store, plan) as lease:
        commit_inputs(store, plan)
        while True:
            shards, gone = _pack(lease.guard(here), telemetry, plan, selections)
            if not gone:
                break
            for name, unit in gone:  # the index was wrong about them
                streams[name].forget([unit])
            _read(store, streams, [(plan.by_id[name], unit) for name, unit in sorted(gone)])
            selections = {name: stream.select() for name, stream in streams.items()}
            if short := _short(plan, selections):
                return short
        combining = [s for s in plan.streams if s.seeds]
        seeds = {s.id: assess(s, config.recipes[s.recipe], load_seeds(store, s)) for s in combining}
        files = _duplicates(plan, streams, selections, telemetry)
        manifest = write_manifest(store, plan, selections, seeds, shards, files)
    return Result(manifest, plan.build_folder, made=True)


def _keep_all(store: Store, plan: Plan) -> None:
    """Copy what workers look at into the store: used references, and held-out images."""
    keep(plan.config.references, store, plan.used_references())
    for settings in held_out_sets(plan.config):
        keep(settings, store, plan.lock.held_out[set_name(settings)].admitted())


def _duplicates(
    plan: Plan, streams: Mapping[str, Stream], selections: Mapping[str, Selection], telemetry: Telemetry
) -> dict[str, bytes]:
    """The file that says what is a duplicate of what, of builds that look for them."""
    told = distinct.tell(plan, streams, selections)
    if told is None:
        return {}
    if told.pairs:
        telemetry.say(
            f"{told.pairs} accepted images look like one of another target:"
            f" {plan.build_folder}/{distinct.FILE}"
        )
    return {distinct.FILE: distinct.to_bytes(told)}


def _short(plan: Plan, selections: Mapping[str, Selection]) -> dict[str, int]:
    """Target → images that are missing for certain, where more units are to be known."""
    short: dict[str, int] = {}
    for stream in plan.streams:
        selection = selections[stream.id]
        if not selection.final:
            # what an unknown unit holds decides about all that come after it
            short[stream.target] = short.get(stream.target, 0) + stream.quota - selection.certain
    return short


def _choose_batches(
    store: Store, plan: Plan, telemetry: Telemetry, make_runner: Callable[[Plan, str], Runner]
) -> None:
    """Let workers of the provisional plan commit the batches that it waits for."""
    store.probe()
    streams = undecided(plan)
    telemetry.say(f"batch auto: trying what fits for {', '.join(sorted(streams))}")
    try:
        runner = make_runner(plan, plan.config.output)
        runner.expected = len(streams)
        with runner:
            _keep_all(store, plan)
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
    combining = [stream for stream in plan.streams if stream.seeds]
    folders = {f"seeds/{stream.seeds}" for stream in combining}
    there = side_by_side(lambda folder: [f"{folder}/{name}" for name in store.list(folder)], folders)
    seen = {name for names in there for name in names}
    tasks: list[Task] = []
    for stream in combining:
        assert stream.seeds is not None
        absent = {seed_name(stream.seeds, r): r for r in stream.references}
        absent = {name: r for name, r in absent.items() if name not in seen}
        seen |= absent.keys()
        tasks += [InvertTask(stream.id, tuple(b)) for b in _batches(list(absent.values()), stream.batch)]
    return tasks


def _batches(references: list[Reference], size: int) -> Iterable[list[Reference]]:
    return (references[i : i + size] for i in range(0, len(references), size))


def _preparations(store: Store, plan: Plan) -> list[Task]:
    wanted = {artifact: (s.id, kind) for s in plan.streams for kind, artifact in s.artifacts.items()}
    wanted |= {
        f.artifact: (s.id, f"filter {f.method.name}") for s in plan.streams for f in s.filters if f.artifact
    }
    there = side_by_side(lambda artifact: store.exists(artifact_name(artifact)), wanted)
    return [
        PrepareTask(*made_by) for made_by, exists in zip(wanted.values(), there, strict=True) if not exists
    ]


def _pack(
    run: Run, telemetry: Telemetry, plan: Plan, selections: Mapping[str, Selection]
) -> tuple[list[ShardReceipt], set[tuple[str, int]]]:
    """The shards; and units that are not as selection was told, whose tasks wrote nothing."""
    shards: list[ShardReceipt] = []
    outdated: set[tuple[str, int]] = set()

    def received(task: Task, receipt: Receipt) -> None:
        if isinstance(receipt, Outdated):
            outdated.update(receipt.units)
            return
        assert isinstance(receipt, tuple)
        shards.extend(receipt)
        telemetry.advance(len(receipt))

    telemetry.phase("pack", pack.count_shards(plan, selections))
    run(ListWork(pack.plan_shards(plan, selections), received))
    return shards, outdated


def _write_run(
    store: Store,
    plan: Plan,
    result: Result,
    runner: Runner,
    started: float,
    of_stream: Mapping[str, Mapping[str, float]],
) -> None:
    """Times and hosts: what differs between two runs of one build, and nothing else depends on."""
    facts = {
        "build_id": plan.build_id,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": result.seconds,
        "units_generated": result.units,
        "busy_share": result.busy_share,
        "streams": {name: dict(made) for name, made in of_stream.items()},
        "device": next((e["device"] for e in result.manifest.environments), ""),
        "workers": runner.workers,
        "restarts": runner.restarts,
        "retries": runner.retries,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "run": plan.config.run.model_dump(mode="json"),
        "references": getattr(plan.config.references, "uri", None),
    }
    store.put(f"{plan.build_folder}/run.json", seal(facts))
