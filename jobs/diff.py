"""`seedloom diff A B`: which samples came, went and changed between two builds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs.options import Json

COLUMNS = ["key", "class", "image_sha256"]
Build = Annotated[
    str, typer.Argument(metavar="OUTPUT[/builds/ID]", help="An output, for its newest build, or one build.")
]


def diff(a: Build, b: Build, json: Json = False) -> None:
    """Compare the samples of two builds: by their keys, and the images of those that both have."""
    facts = compare(table_of(a), table_of(b))
    if json:
        import json as json_library

        print(json_library.dumps(facts))
        return
    for label, counts in facts["classes"].items():
        if counts["came"] or counts["went"] or counts["changed"]:
            print(
                f"{label}: {counts['came']} came, {counts['went']} went, {counts['changed']} changed,"
                f" {counts['same']} the same"
            )
    came, went, changed = (len(facts[what]) for what in ("came", "went", "changed"))
    if came or went or changed:
        print(f"{came} came, {went} went, {changed} changed, {facts['same']} the same")
    else:
        print(f"the same {facts['same']} samples")


def table_of(build: str) -> Any:
    """Key, class and image hash of every sample of a build, sorted by key. Raises `UserError`."""
    import pyarrow as pa

    from pipeline.ledger import named
    from pipeline.parts import read_table
    from pipeline.store import Store

    output, _, build_id = build.rstrip("/").rpartition("/builds/")
    store = Store(output or build)
    manifest = named(store, build_id if output else None)
    folder = f"builds/{manifest.build_id}/shards"
    parts = [read_table(store, f"{folder}/{shard.name}.parquet", COLUMNS) for shard in manifest.shards]
    empty = pa.table({name: pa.array([], pa.string()) for name in COLUMNS})
    return pa.concat_tables([part.cast(empty.schema) for part in parts] or [empty]).sort_by("key")


def compare(a: Any, b: Any) -> dict[str, Any]:
    """Counts for each class, and the keys that came, went and changed from `a` to `b`."""
    import pyarrow.compute as pc

    joined = a.join(b, "key", "key", "full outer", "_a", "_b", coalesce_keys=True).sort_by("key")
    inside = {name: pc.is_valid(joined[f"image_sha256_{name}"]) for name in "ab"}
    both = pc.and_(inside["a"], inside["b"])
    other = pc.or_(
        pc.not_equal(joined["image_sha256_a"], joined["image_sha256_b"]),
        pc.not_equal(joined["class_a"], joined["class_b"]),
    )
    changed = pc.and_(both, pc.fill_null(other, False))
    masks = {
        "came": pc.invert(inside["a"]),
        "went": pc.invert(inside["b"]),
        "changed": changed,
        "same": pc.and_(both, pc.invert(changed)),
    }
    label = pc.coalesce(joined["class_b"], joined["class_a"])
    classes = {name: dict.fromkeys(masks, 0) for name in sorted(pc.unique(label).to_pylist())}
    for what, mask in masks.items():
        for entry in pc.value_counts(label.filter(mask)).to_pylist():
            classes[entry["values"]][what] = entry["counts"]
    return {
        "classes": classes,
        "same": pc.sum(masks["same"]).as_py() or 0,
        **{what: joined["key"].filter(masks[what]).to_pylist() for what in ("came", "went", "changed")},
    }


if __name__ == "__main__":
    from jobs.entry import run

    run(diff)
