"""`seedloom status URI`: the complete builds of an output and what the newest one holds."""

from __future__ import annotations

from jobs.options import BuildId, Json, Uri


def status(uri: Uri, build: BuildId = None, json: Json = False) -> None:
    """What an output holds: complete builds, builds under way, and the counts of one build."""
    from pipeline.ledger import history, named
    from pipeline.store import Store

    store = Store(uri)
    entries = history(store)
    complete = {entry["build_id"] for entry in entries}
    unfinished = [name for name in store.list("builds") if name not in complete]
    manifest = named(store, build) if build or entries else None
    if json:
        import json as json_library

        content = manifest.model_dump(mode="json") if manifest else None
        print(json_library.dumps({"history": entries, "unfinished": unfinished, "manifest": content}))
        return
    for entry in entries:
        pruned = "" if store.exists(f"builds/{entry['build_id']}/manifest.json") else "  (pruned)"
        print(
            f"{entry['number']:>4}  {entry['build_id']}  {entry['name']}: {entry['samples']} samples{pruned}"
        )
    for name in unfinished:
        print(f"      {name}  not complete: run its `seedloom build` again to go on")
    if not entries and not unfinished:
        print(f"{uri}: no builds")
    if manifest is None:
        return
    print(f"\nbuild {manifest.build_id} ({manifest.name})")
    for label, target in manifest.targets.items():
        print(f"  {label}: references {target.admitted} admitted, {target.quarantined} quarantined")
        for name, r in target.recipes.items():
            note = f", short by {r.missing}" if r.missing else ""
            print(
                f"    {name}: {r.accepted} accepted of {r.quota}{note}; {sum(r.rejected.values())} rejected,"
                f" {r.surplus} surplus, {r.failed} failed of {r.candidates} candidates"
            )


if __name__ == "__main__":
    from jobs.entry import run

    run(status)
