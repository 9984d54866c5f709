"""`seedloom status URI`: the builds of an output, the newest one's counts, and how far others are."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from jobs.options import BuildId, Json, Uri

LOOK = 5.0  # seconds between two looks
HEARTBEAT = 15.0


def status(
    uri: Uri,
    build: BuildId = None,
    json: Json = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until no build is under way; tell what changes.")
    ] = False,
) -> None:
    """What an output holds: complete builds, those under way and how far they are, and one build's counts.

    It looks at the store alone, so that any machine which sees that can ask.
    """
    from pipeline.store import Store

    store = Store(uri)
    if not follow:
        _tell(look(store, build), uri, json)
        return
    said = None
    while True:
        facts = look(store, build)
        if facts != said:
            _tell(facts, uri, json)
        if not facts["unfinished"]:
            return
        said = facts
        time.sleep(LOOK)


def look(store: Any, build: str | None = None) -> dict[str, Any]:
    """History, builds under way with their counts, and the manifest of a build: plain data."""
    from pipeline.ledger import history, named

    entries = history(store)
    complete = {entry["build_id"] for entry in entries}
    there = {name for name in complete if store.exists(f"builds/{name}/manifest.json")}
    manifest = named(store, build) if build or there else None
    return {
        "history": [entry | {"pruned": entry["build_id"] not in there} for entry in entries],
        "unfinished": {n: _progress(store, n) for n in store.list("builds") if n not in complete},
        "manifest": manifest.model_dump(mode="json") if manifest else None,
    }


def _progress(store: Any, build: str) -> dict[str, Any]:
    """How far an unfinished build is, and who is at work."""
    from pipeline.build import lease_of, survey
    from pipeline.lease import Lease
    from pipeline.ledger import replan
    from pipeline.phases import tallies
    from schemas.errors import UserError

    try:
        plan = replan(store, build)
    except (UserError, FileNotFoundError) as error:  # other models here, or it has only just begun
        return {"at_work": Lease(store, f"build-{build}", HEARTBEAT).told(), "unknown": str(error)}
    counts = tallies(plan.streams, survey(store, plan, lambda text: None).streams)
    return {
        "at_work": lease_of(store, plan).told(),
        "targets": {name: vars(tally) for name, tally in counts.items()},
    }


def _tell(facts: dict[str, Any], uri: str, json: bool) -> None:
    if json:
        import json as json_library

        print(json_library.dumps(facts), flush=True)
        return
    for entry in facts["history"]:
        said = f"{entry['name']}: {entry['samples']} samples" + ("  (pruned)" if entry["pruned"] else "")
        print(f"{entry['number']:>4}  {entry['build_id']}  {said}")
    for name, found in facts["unfinished"].items():
        by = f"begun or taken up {found['at_work']}" if found["at_work"] else "nobody is at work"
        print(f"      {name}  not complete, {by}: run its `seedloom build` again to go on")
        if "unknown" in found:
            print(f"        how far it is cannot be told here: {found['unknown']}")
        for target, n in found.get("targets", {}).items():
            print(
                f"        {target}: {n['accepted']} accepted of {n['quota']}; {n['rejected']} rejected,"
                f" {n['failed']} failed"
            )
    if not facts["history"] and not facts["unfinished"]:
        print(f"{uri}: no builds")
    if facts["manifest"]:
        _tell_manifest(facts["manifest"])


def _tell_manifest(manifest: dict[str, Any]) -> None:
    print(f"\nbuild {manifest['build_id']} ({manifest['name']})")
    for label, target in manifest["targets"].items():
        print(f"  {label}: references {target['admitted']} admitted, {target['quarantined']} quarantined")
        for name, r in target["recipes"].items():
            note = f", short by {r['missing']}" if r["missing"] else ""
            print(
                f"    {name}: {r['accepted']} accepted of {r['quota']}{note}; {sum(r['rejected'].values())}"
                f" rejected, {r['surplus']} surplus, {r['failed']} failed of {r['candidates']} candidates"
            )


if __name__ == "__main__":
    from jobs.entry import run

    run(status)
