"""The images of a build, and the real ones beside them, as a table with a row for each.

Letters as in `jobs.train.epoch`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.train import epoch as epochs
from jobs.train.files import Files
from jobs.train.ranks import agreed
from pipeline.references import Lock, reference_name
from schemas.errors import Damaged, UserError
from schemas.ids import sha256
from schemas.manifest import Manifest
from schemas.tables import refuse_newer
from stages import registry

THREADS = 8
WHOLE = -1  # the length of a file that is an image

log = logging.getLogger("seedloom")

PLACE = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("class", pa.string()),
        pa.field("image_sha256", pa.string()),  # null: of a real image from a folder, whose hash is not known
        pa.field("shard", pa.int32()),  # its place in the manifest, or epochs.REAL
        pa.field("file", pa.string()),  # of a real image: its name in the store or the folder
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int64()),
    ]
)


def samples(files: Files, manifest: Manifest, where: pc.Expression | None, damaged: str) -> pa.Table:
    """The samples of all shards that can be read, with the places of their bytes."""
    if damaged not in ("raise", "skip"):
        raise UserError(f"damaged={damaged!r}; allowed are 'raise' and 'skip'")
    folder = f"builds/{manifest.build_id}/shards"
    sizes = {stored.name: stored.size for stored in files.store.walk(folder)}

    def read(number: int) -> pa.Table | Damaged:
        shard = manifest.shards[number]
        name = f"{folder}/{shard.name}"
        try:
            found = sizes.get(f"{name}.tar")
            if found != shard.tar_bytes and not files.copied_already(shard.tar_sha256):
                state = "is missing" if found is None else f"damaged ({found} bytes of {shard.tar_bytes})"
                raise Damaged(f"{files.uri}/{name}.tar: {state}")
            return _rows(files, f"{name}.parquet", shard.parquet_sha256, number, where)
        except Damaged as error:
            return error

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(read, range(len(manifest.shards))))
    errors = [error if isinstance(error, Damaged) else None for error in found]
    if damaged == "raise":
        for error in filter(None, errors):
            raise Damaged(f"{error}; bring it back, or leave it out with damaged='skip'")
    left_out = agreed({number for number, error in enumerate(errors) if error})
    for number in sorted(left_out):
        log.warning(
            "%s; left out", errors[number] or f"{folder}/{manifest.shards[number].name}: not everywhere"
        )
    kept = [table for number, table in enumerate(found) if number not in left_out]
    return pa.concat_tables([PLACE.empty_table(), *kept])


def _rows(files: Files, name: str, digest: str, number: int, where: pc.Expression | None) -> pa.Table:
    """What is chosen of the samples of one shard."""
    try:
        data = files.path(name, digest).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{files.uri}/{name}: is missing") from None
    if sha256(data) != digest:
        raise Damaged(f"{files.uri}/{name}: damaged (its hash is not the one in the manifest)")
    refuse_newer(pq.read_schema(pa.BufferReader(data)), f"{files.uri}/{name}")
    columns = ["key", "class", "image_sha256", "offset", "length"]
    try:
        table = pq.read_table(pa.BufferReader(data), columns=columns, filters=where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        known = pq.read_schema(pa.BufferReader(data))
        raise UserError(
            f"where={where}: {str(error).splitlines()[0]}; the columns are"
            f" {', '.join(f'{column.name} ({column.type})' for column in known)}"
        ) from error
    return _table(
        {name: table[name] for name in columns}
        | {"shard": [number] * table.num_rows, "file": [None] * table.num_rows}
    )


def kept_references(files: Files, manifest: Manifest) -> pa.Table:
    """The references of the build as far as the store keeps them."""
    name = f"builds/{manifest.build_id}/references.lock"
    lock = Lock.from_bytes(files.store.get(name), f"{files.uri}/{name}")
    kept = {stored.name for stored in files.store.walk("references")}
    admitted = [(label, r.sha256) for label, references in lock.classes.items() for r in references]
    there = [(label, digest) for label, digest in admitted if reference_name(digest) in kept]
    if not there:
        raise UserError(
            f"real: build {manifest.build_id} keeps none of its {len(admitted)} references, because its"
            " recipes start from none; name a folder with `references`"
        )
    if len(there) < len(admitted):
        log.warning("%d of %d references are kept with the build", len(there), len(admitted))
    digests = [digest for _, digest in there]
    return _real([label for label, _ in there], digests, digests, [reference_name(d) for d in digests])


def folder_of(uri: str) -> pa.Table:
    """The images of a folder with one subfolder for each class."""
    cls: Any = registry.resolve("read", "imagefolder")
    items = [item for item in cls(cls.Config(uri=uri)).items() if item.label]
    origins = [item.origin for item in items]
    return _real([item.label for item in items], origins, [None] * len(items), origins)


def _real(labels: list[str], keys: list[str], digests: list[Any], names: list[str]) -> pa.Table:
    count = len(keys)
    return _table(
        {"key": keys, "class": labels, "image_sha256": digests, "shard": [epochs.REAL] * count, "file": names}
        | {"offset": [0] * count, "length": [WHOLE] * count}
    )


def _table(columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({field.name: columns[field.name] for field in PLACE}).cast(PLACE)
