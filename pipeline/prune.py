"""Pruning: what no kept build is made from goes.

Kept are the newest complete builds, and those of the last day; with each its folder, the references of its
lock, and the folders that its manifest names. Everything else below parts, scores, seeds, artifacts,
references and builds is removed, but for objects that are younger than a day, for those may belong to what
somebody has just begun. Removing holds the lease of the whole store, and does not begin while any build is at
work. The history keeps its numbers.

A manifest goes before its shards, so that a build never looks complete when it is not; and a prune that is
killed is finished by the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.lease import PRUNE, Lease
from pipeline.ledger import history
from pipeline.references import Lock, reference_name
from pipeline.store import Store, Stored
from schemas.errors import UserError
from schemas.manifest import Manifest

SPARED = 24 * 3600.0  # seconds
KINDS = ("builds", "parts", "scores", "seeds", "artifacts", "references")


@dataclass(frozen=True)
class Prunable:
    """What no kept build names, the manifests first."""

    kept: tuple[str, ...]  # builds
    removed: tuple[str, ...]  # complete builds
    objects: tuple[Stored, ...]
    spared: int  # objects that are too young

    @property
    def size(self) -> int:
        return sum(stored.size for stored in self.objects)


def prunable(store: Store, keep: int | None) -> Prunable:
    """What can go when the newest `keep` complete builds stay, or all of them. Raises `UserError`."""
    order = list(dict.fromkeys(entry["build_id"] for entry in reversed(history(store))))
    complete = [name for name in order if store.exists(f"builds/{name}/manifest.json")]
    there = [stored for kind in KINDS for stored in store.walk(kind)]
    changed = {stored.name: _changed(store, stored) for stored in there}
    now, spared, found = time.time(), 0, list[Stored]()
    young = {name for name in complete if now - changed[f"builds/{name}/manifest.json"] < SPARED}
    kept = [name for n, name in enumerate(complete) if keep is None or n < keep or name in young]
    wanted = {prefix for name in kept for prefix in _needed(store, name)}
    for stored in there:
        if _under(stored.name, wanted) or stored.name.endswith("/batch.json"):  # small, and a setting
            continue
        if now - changed[stored.name] < SPARED:
            spared += 1
        else:
            found.append(stored)
    found.sort(key=lambda stored: not stored.name.endswith("/manifest.json"))
    gone = tuple(name for name in complete if name not in kept and _whole(name, found))
    return Prunable(tuple(kept), gone, tuple(found), spared)


def prune(store: Store, keep: int | None, heartbeat: float) -> Prunable:
    """Remove it. Raises `Busy` while a build is at work, and `UserError`."""
    with Lease(store, PRUNE, heartbeat) as lease:
        for name in store.list("leases"):
            if name != PRUNE:
                Lease(store, name, heartbeat).demand_free()
        found = prunable(store, keep)
        for stored in found.objects:
            lease.check()
            store.remove(stored.name)
    return found


def _needed(store: Store, build: str) -> Iterator[str]:
    """Folders and objects that a complete build is made from."""
    folder = f"builds/{build}"
    yield f"{folder}/"
    name = f"{folder}/manifest.json"
    manifest = Manifest.from_bytes(store.get(name), f"{store.uri}/{name}")
    for label, target in manifest.targets.items():
        for recipe, account in target.recipes.items():
            if not account.objects:
                raise UserError(
                    f"build {build}: its manifest is of an older format and does not say what {label} /"
                    f" {recipe} is made from; build it again, or keep fewer builds"
                )
            yield from (f"{objects}/" for objects in account.objects)
    name = f"{folder}/references.lock"
    lock = Lock.from_bytes(store.get(name), f"{store.uri}/{name}")
    for kept in (lock, *lock.held_out.values()):
        yield from (reference_name(r.sha256) for r in kept.admitted())


def _changed(store: Store, stored: Stored) -> float:
    if stored.changed is None:
        raise UserError(f"{store.uri}: it does not say when {stored.name} was written; nothing is removed")
    return stored.changed


def _under(name: str, wanted: set[str]) -> bool:
    """Whether an object is one of these, or in one of these folders."""
    parts = name.split("/")
    return name in wanted or any(f"{'/'.join(parts[:n])}/" in wanted for n in range(1, len(parts)))


def _whole(build: str, found: list[Stored]) -> bool:
    return any(stored.name == f"builds/{build}/manifest.json" for stored in found)
