"""`seedloom prune URI`: remove what no kept build is made from."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from jobs.options import Json, Uri

HEARTBEAT = 15.0  # seconds


def prune(
    uri: Uri,
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many of the newest complete builds; all, unless given."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Remove parts, scores, seeds, artifacts, references and builds that no kept build is made from.

    What is younger than 24 hours stays. Exit code 5 while a build is at work in the output.
    """
    from pipeline import prune as pruning
    from pipeline.store import Store

    store = Store(uri)
    found = pruning.prunable(store, keep) if dry_run else pruning.prune(store, keep, HEARTBEAT)
    counts = Counter(stored.name.split("/")[0] for stored in found.objects)
    if json:
        import json as json_library

        facts = {
            "dry_run": dry_run,
            "kept": found.kept,
            "removed": found.removed,
            "objects": dict(counts),
            "bytes": found.size,
            "spared": found.spared,
        }
        print(json_library.dumps(facts))
        return
    print(f"{len(found.kept)} builds kept: {', '.join(found.kept) or 'none'}")
    verb = "would be removed" if dry_run else "removed"
    print(f"{len(found.removed)} builds {verb}: {', '.join(found.removed) or 'none'}")
    for kind in pruning.KINDS:
        if counts[kind]:
            print(f"  {counts[kind]} objects of {kind}")
    size = f"{found.size / 1e6:.1f} MB"
    print(f"{len(found.objects)} objects, {size}, {verb}; {found.spared} younger than a day stay")


if __name__ == "__main__":
    from jobs.entry import run

    run(prune)
