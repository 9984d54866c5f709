"""`seedloom reproduce URI KEY`: make one sample again and compare it with the stored one, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import BuildId, Uri


def reproduce(
    uri: Uri,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The key of a sample, as in the shards, or of any candidate.")
    ],
    build: BuildId = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the image that was made again to this file.")
    ] = None,
) -> None:
    """Run the device batch of one candidate again and say whether its bytes agree. Exit code 1 if not."""
    from pipeline.ledger import named, replan
    from pipeline.store import Store
    from pipeline.worker import Worker

    store = Store(uri)
    manifest = named(store, build)
    plan = replan(store, manifest.build_id)
    row = find(store, manifest, plan, key)
    worker = Worker(plan, uri)
    image = worker.remake(row["stream"], row["index"])
    if out is not None:
        out.write_bytes(image)
    same = image == row["image"]
    print(f"{key}: class {row['class']}, recipe {row['recipe']}, candidate {row['index']}")
    print(f"  prompt  {row['prompt']}")
    for parent, weight in zip(row["parents"], row["weights"], strict=True):
        print(f"  parent  {parent}  weight {weight:.6f}")
    print(f"  stored  {row['image_sha256']}  {len(row['image'])} bytes")
    if same:
        print("  made again: the same bytes")
        return
    print(f"  made again: {len(image)} other bytes")
    here, there = worker.environment(), manifest.environments
    if here not in there:
        differing = {k: v for k, v in here.items() if all(e.get(k) != v for e in there)}
        print(f"  this environment differs from the build's: {differing}")
    raise typer.Exit(1)


def find(store: Any, manifest: Any, plan: Any, key: str) -> dict[str, Any]:
    """The Parquet row of a sample or of any other candidate, with the stored image. Raises `UserError`."""
    import pyarrow.compute as pc

    from pipeline.pack import read_unit
    from pipeline.parts import part_name, read_table
    from schemas.errors import UserError

    for shard in manifest.shards:
        base = f"builds/{manifest.build_id}/shards/{shard.name}"
        table = read_table(store, f"{base}.parquet")
        for row in table.filter(pc.field("key") == key).to_pylist():
            row["image"] = store.get_range(f"{base}.tar", row["offset"], row["length"])
            return row
    number = ["", *key.split("-")][-2]
    index = int(number) if number.isdecimal() else 0
    for stream in plan.streams:  # what was not accepted is in its part alone
        unit = index // stream.unit
        if stream.key(index) == key and store.exists(part_name(stream, unit)):
            row = read_unit(store, plan, stream.id, unit)[index % stream.unit]
            if row["image"] is None:
                raise UserError(f"{key!r}: failed ({row['error']}), so there is no image to compare with")
            return row
    raise UserError(
        f"{key!r}: no such candidate in build {manifest.build_id}; its Parquet files have the keys"
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(reproduce)
