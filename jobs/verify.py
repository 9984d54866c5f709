"""`seedloom verify URI`: is a build what was written, whole and in agreement with itself?

One line for each fault, and exit code 1 when there is any.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from jobs.options import BuildId, Uri


def verify(
    uri: Uri,
    build: BuildId = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image as well.")] = False,
) -> None:
    """Hash every file of a build again and compare tars, Parquet and manifest. Exit code 1 for any fault."""
    from pipeline.store import Store

    store = Store(uri)
    manifest, problems = _manifest(store, build)
    faults = 0
    for fault in itertools.chain(problems, _faults(store, manifest, deep) if manifest else ()):
        faults += 1
        print(fault)
    if faults:
        print(f"{faults} faults")
        raise typer.Exit(1)
    assert manifest is not None  # no problems
    print(
        f"build {manifest.build_id}: {len(manifest.shards)} shards, {manifest.samples} samples, no fault"
        + (", every image decoded" if deep else "")
    )


def _manifest(store: Any, build_id: str | None) -> tuple[Any, list[str]]:
    """The manifest, checked against the history that recorded its hash."""
    from pipeline.ledger import history, named
    from schemas.errors import Damaged
    from schemas.ids import sha256
    from schemas.sealed import unseal

    problems = []
    try:
        entries = history(store)
        manifest = named(store, build_id)
    except Damaged as error:
        return None, [str(error)]
    # of the bytes that lie there: written again, an older format would have others
    digest = sha256(store.get(f"builds/{manifest.build_id}/manifest.json"))
    recorded = [e["manifest_sha256"] for e in entries if e["build_id"] == manifest.build_id]
    if not recorded:
        problems.append(f"{store.uri}/history: does not record build {manifest.build_id}")
    elif digest not in recorded:
        problems.append(f"builds/{manifest.build_id}/manifest.json: is not the one that history/ records")
    for name in ("latest.json", f"builds/{manifest.build_id}/run.json"):
        try:
            unseal(store.get(name), f"{store.uri}/{name}")
        except FileNotFoundError:
            continue  # hints: a crash right after the manifest may leave none
        except Damaged as error:
            problems.append(str(error))
    return manifest, problems


def _faults(store: Any, manifest: Any, deep: bool) -> Iterator[str]:
    folder = f"builds/{manifest.build_id}"
    for name, digest in manifest.files.items():
        yield from _read(store, f"{folder}/{name}", digest)[1]
    named = {f"{s.name}.{suffix}" for s in manifest.shards for suffix in ("tar", "parquet")}
    for extra in sorted(set(store.list(f"{folder}/shards")) - named):
        yield f"{folder}/shards/{extra}: is not in the manifest"
    keys: set[str] = set()
    rows = 0
    for shard in manifest.shards:
        base = f"{folder}/shards/{shard.name}"
        tar, tar_faults = _read(store, f"{base}.tar", shard.tar_sha256)
        parquet, parquet_faults = _read(store, f"{base}.parquet", shard.parquet_sha256)
        faults = tar_faults + parquet_faults
        yield from faults
        rows += shard.rows
        if not faults:  # a damaged file is named once, not for each thing in it that is wrong
            yield from _parity(tar, parquet, shard, base, keys, deep)
    accepted = sum(r.accepted for t in manifest.targets.values() for r in t.recipes.values())
    if not rows == manifest.samples == accepted:
        yield f"{folder}/manifest.json: {rows} rows, {manifest.samples} samples, {accepted} accepted"
    for label, target in manifest.targets.items():
        for name, r in target.recipes.items():
            if r.candidates != r.accepted + sum(r.rejected.values()) + r.surplus + r.failed:
                yield f"{folder}/manifest.json: the candidates of {label} / {name} do not add up"


def _read(store: Any, name: str, digest: str) -> tuple[bytes, list[str]]:
    """The bytes of a file, read once, and what is wrong with them."""
    from schemas.ids import sha256

    try:
        data = store.get(name)
    except FileNotFoundError:
        return b"", [f"{name}: is missing"]
    return data, [] if sha256(data) == digest else [f"{name}: its hash is not the one in the manifest"]


def _parity(tar: bytes, parquet: bytes, shard: Any, base: str, keys: set[str], deep: bool) -> Iterator[str]:
    """Whether a tar and its Parquet speak of the same samples, and the bytes are where they should be."""
    import tarfile

    import pyarrow.parquet as pq

    from schemas.ids import sha256
    from schemas.tables import refuse_newer
    from stages.images import NotAnImage, decode

    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = {m.name: (m.offset_data, m.size) for m in archive.getmembers()}
    table = pq.read_table(io.BytesIO(parquet))
    refuse_newer(table.schema, f"{base}.parquet")
    rows = table.to_pylist()
    if len(rows) != shard.rows:
        yield f"{base}.parquet: {len(rows)} rows, the manifest says {shard.rows}"
    in_tar = {name.partition(".")[0] for name in members}
    for key in sorted(in_tar ^ {row["key"] for row in rows}):
        where = "tar" if key in in_tar else "parquet"
        yield f"{base}: {key} is in the {where} alone"
    for row in rows:
        if row["key"] in keys:
            yield f"{base}: {row['key']} stands in the build twice"
        keys.add(row["key"])
        if members.get(row["member"]) != (row["offset"], row["length"]):
            yield f"{base}: {row['member']} is not where the parquet says"
            continue
        image = tar[row["offset"] : row["offset"] + row["length"]]
        if sha256(image) != row["image_sha256"]:
            yield f"{base}: {row['member']} is not the image that the parquet describes"
        elif deep:
            try:
                size = decode(image).size
            except NotAnImage as error:
                yield f"{base}: {row['member']} cannot be decoded ({error})"
                continue
            if size != (row["width"], row["height"]):
                yield f"{base}: {row['member']} is {size}, the parquet says {(row['width'], row['height'])}"


if __name__ == "__main__":
    from jobs.entry import run

    run(verify)
