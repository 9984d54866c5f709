"""Builds on record: what a build was made from, its manifest, and the history of complete builds.

builds/<id>/{config.yaml, references.lock}   before anything is made
builds/<id>/manifest.json                    last: only what it names is the dataset
history/<n>.json, latest.json                each complete build, and a hint to the newest
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config import parse
from pipeline.plan import Plan, StreamPlan, make_plan
from pipeline.references import Lock
from pipeline.select import Selection
from pipeline.store import Store
from pipeline.tasks import SeedsReceipt, ShardReceipt
from schemas.errors import UserError
from schemas.ids import sha256
from schemas.manifest import Manifest, RecipeAccount, SeedsAccount, Shard, TargetAccount
from schemas.sealed import seal, unseal


def _inputs(plan: Plan) -> dict[str, bytes]:
    config = yaml.safe_dump(plan.config.described(), sort_keys=True, allow_unicode=True)
    return {"config.yaml": config.encode(), "references.lock": plan.lock.to_bytes()}


def commit_inputs(store: Store, plan: Plan) -> None:
    """Write what the build is made from, unless it is there."""
    for name, data in _inputs(plan).items():
        store.put_new(f"{plan.build_folder}/{name}", data)


def write_manifest(
    store: Store,
    plan: Plan,
    selections: Mapping[str, Selection],
    seeds: Mapping[str, SeedsReceipt],
    shards: Sequence[ShardReceipt],
    files: Mapping[str, bytes],
) -> Manifest:
    """Write these files of the build, then the manifest, and enter the build into the history."""
    for name, data in files.items():
        store.put_new(f"{plan.build_folder}/{name}", data)
    used = frozenset[str]().union(*(selection.environments for selection in selections.values()))
    references = plan.lock.account()
    targets: dict[str, dict[str, Any]] = {}
    for stream in plan.streams:
        counted = references.get(stream.label, {"admitted": 0, "quarantined": 0})
        target = targets.setdefault(
            stream.target,
            {
                "label": stream.label,
                "class_index": stream.class_index,
                "prompt": stream.prompt,
                **counted,
                "recipes": {},
            },
        )
        target["recipes"][stream.recipe] = _recipe_account(
            stream, selections[stream.id], seeds.get(stream.id)
        )
    manifest = Manifest(
        build_id=plan.build_id,
        name=plan.config.name,
        samples=sum(shard.rows for shard in shards),
        classes=plan.classes,
        targets={name: TargetAccount.model_validate(target) for name, target in targets.items()},
        quarantined={label: n["quarantined"] for label, n in references.items() if n["quarantined"]},
        shards=tuple(Shard(**vars(shard)) for shard in sorted(shards, key=lambda s: s.name)),
        files={name: sha256(data) for name, data in {**_inputs(plan), **files}.items()},
        models=dict(plan.models),
        environments=tuple(json.loads(e) for e in sorted(used)),
    )
    store.put_new(f"{plan.build_folder}/manifest.json", manifest.to_bytes())
    record(store, manifest)
    return manifest


def _recipe_account(stream: StreamPlan, selection: Selection, seeds: SeedsReceipt | None) -> RecipeAccount:
    return RecipeAccount(
        seeds=SeedsAccount(used=seeds.used, refused=dict(seeds.refused), correlation=seeds.correlation)
        if seeds
        else None,
        quota=stream.quota,
        accepted=len(selection.accepted),
        candidates=selection.candidates,
        rejected=dict(selection.rejected),
        surplus=selection.surplus,
        failed=selection.failed,
        missing=selection.missing,
        exhausted=selection.exhausted,
        objects=objects_of(stream),
    )


def objects_of(stream: StreamPlan) -> tuple[str, ...]:
    """Folders of the store that hold what a stream is made from."""
    return tuple(
        sorted(
            [
                f"parts/{stream.id}",
                *(f"scores/{stream.id}/{f.id}" for f in stream.filters),
                *([f"seeds/{stream.seeds}"] if stream.seeds else []),
                *(f"artifacts/{artifact}" for artifact in stream.artifacts.values()),
                *(f"artifacts/{f.artifact}" for f in stream.filters if f.artifact),
            ]
        )
    )


def history(store: Store) -> list[dict[str, Any]]:
    """The complete builds of a store, oldest first."""
    names = (name.removesuffix(".json") for name in store.list("history"))
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return [unseal(store.get(f"history/{n}.json"), f"{store.uri}/history/{n}.json") for n in numbers]


def record(store: Store, manifest: Manifest) -> None:
    """Enter a build into the history unless it is the newest there, and point to it."""
    while True:
        entries = history(store)
        if entries and entries[-1]["build_id"] == manifest.build_id:
            return
        entry = {
            "number": entries[-1]["number"] + 1 if entries else 1,
            "build_id": manifest.build_id,
            "name": manifest.name,
            "samples": manifest.samples,
            # of the bytes that lie there: they may be of an older format
            "manifest_sha256": sha256(store.get(f"builds/{manifest.build_id}/manifest.json")),
        }
        if store.put_new(f"history/{entry['number']}.json", seal(entry)):
            store.put("latest.json", seal(entry))
            return


def existing(store: Store, plan: Plan) -> Manifest | None:
    name = f"{plan.build_folder}/manifest.json"
    try:
        return Manifest.from_bytes(store.get(name), f"{store.uri}/{name}")
    except FileNotFoundError:
        return None


def named(store: Store, build_id: str | None = None) -> Manifest:
    """The manifest of a build, by default of the newest complete one. Raises `UserError`."""
    if build_id is None:
        entries = history(store)
        if not entries:
            raise UserError(f"{store.uri}: no complete build there; run `seedloom build` first")
        build_id = entries[-1]["build_id"]
    name = f"builds/{build_id}/manifest.json"
    try:
        return Manifest.from_bytes(store.get(name), f"{store.uri}/{name}")
    except FileNotFoundError:
        known = ", ".join(store.list("builds")) or "none"
        raise UserError(f"{store.uri}: no complete build {build_id!r}; builds there: {known}") from None


def replan(store: Store, build_id: str) -> Plan:
    """The plan of a build, from what is kept with it. Raises `UserError` when it cannot be had."""
    folder = f"builds/{build_id}"
    content = yaml.safe_load(store.get(f"{folder}/config.yaml"))
    lock = Lock.from_bytes(store.get(f"{folder}/references.lock"), f"{store.uri}/{folder}/references.lock")
    if content.get("references"):
        content["references"]["uri"] = "kept-in-the-store"
    plan = make_plan(parse({**content, "output": store.uri}, f"{folder}/config.yaml"), lock)
    if plan.build_id != build_id:
        raise UserError(
            f"build {build_id} was made with other models or methods than the ones here, which would"
            f" make {plan.build_id}; use the seedloom and model versions of that build"
        )
    return plan
