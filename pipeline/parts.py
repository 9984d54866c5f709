"""Parts and scores: the committed output of a unit, and of scoring it with one filter."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import FilterPlan, StreamPlan
from pipeline.select import FAILED, PASSED, Signatures
from pipeline.store import Store
from schemas import tables
from schemas.errors import Damaged, UserError
from schemas.ids import canonical, sha256
from schemas.records import Verdict
from stages.shard import parquet


def part_name(stream: StreamPlan, unit: int) -> str:
    return f"parts/{stream.id}/{unit:06d}.parquet"


def scores_name(stream: StreamPlan, chosen: FilterPlan, unit: int) -> str:
    return f"scores/{stream.id}/{chosen.id}/{unit:06d}.parquet"


@cache
def environment(device: str, precision: str) -> dict[str, str]:
    """What the bits of a result may depend on besides its fingerprint: libraries, and what a device chose."""
    from importlib.metadata import version

    import torch

    libraries = (
        "torch",
        "diffusers",
        "transformers",
        "open_clip_torch",
        "timm",
        "numpy",
        "pillow",
        "simplejpeg",
        "pyarrow",
    )
    kind = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device": f"{device} {kind}",
        "precision": precision,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def to_parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, metadata: Mapping[str, Any]) -> bytes:
    """Rows as Parquet bytes, deterministic; `metadata` values are written as canonical JSON.

    Parquet has checksums on its pages, but none on its footer; so the metadata hold one of everything that
    is not an image. Images are known by their `image_sha256`.
    """
    plain = pa.schema([field for field in schema if field.name != "image"])
    table = pa.Table.from_pylist([{name: row[name] for name in plain.names} for row in rows], plain)
    written = {k: canonical(v) for k, v in metadata.items()}
    written["sha256"] = canonical(_digest(table, written))
    return parquet.write(rows, schema.with_metadata(written))


def _digest(table: pa.Table, metadata: Mapping[str, bytes]) -> str:
    content = [table.to_pylist(), {key: value.decode() for key, value in metadata.items()}]
    return sha256(json.dumps(content, sort_keys=True).encode())


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet object of ours, checked; images are read only when asked for.

    Raises `FileNotFoundError`, `Damaged`, and `UserError` for a newer format.
    """

    def read() -> pa.Table:
        with (
            store.fs.open(store.path(name), "rb") as file,
            pq.ParquetFile(file, page_checksum_verification=True) as parquet_file,
        ):
            present = parquet_file.schema_arrow.names
            whole = columns is None or "image" in columns
            return parquet_file.read([name for name in present if whole or name != "image"])

    try:
        table = store.attempt(read, name)
        metadata = {key.decode(): value for key, value in table.schema.metadata.items()}
        tables.refuse_newer(table.schema, f"{store.uri}/{name}")
        _check(table, metadata)
    except Exception as error:
        # what pyarrow raises for damage has no errno; what has one is trouble of the store, not of the object
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Damaged(f"{store.uri}/{name}: damaged ({reason}); remove it and build again") from error
    return table if columns is None else table.select(columns)


def _check(table: pa.Table, metadata: dict[str, bytes]) -> None:
    """Compare a table with the hashes that it carries. Raises `ValueError`."""
    plain = table.drop_columns(["image"]) if "image" in table.column_names else table
    if json.loads(metadata.pop("sha256")) != _digest(plain, metadata):
        raise ValueError("its content does not match the hash that it carries")
    if plain is not table:
        hashes = table.column("image_sha256").to_pylist()
        for image, digest in zip(contents(table), hashes, strict=True):
            if image is not None and sha256(image) != digest:
                raise ValueError(f"image {digest} is another one")


def contents(table: pa.Table) -> list[memoryview | None]:
    """The encoded images of a part, as views into the table; None for failed candidates."""
    buffers = (image.as_buffer() for image in table.column("image"))
    # Arrow's bytes have a sign, and would not equal Python's
    return [None if buffer is None else memoryview(buffer).cast("B") for buffer in buffers]


def _signatures(table: pa.Table) -> Signatures:
    rows = [row or [] for row in table.column("embedding").to_pylist()]
    size = max(map(len, rows))
    blank = [float("nan")] * size
    hashes = [n or 0 for n in table.column("hash").to_pylist()]
    return Signatures(np.array(hashes, np.int64), np.array([row or blank for row in rows], np.float32))


@dataclass(frozen=True)
class UnitAccount:
    """What selection and the manifest need to know of a committed and scored unit."""

    outcomes: tuple[str, ...]  # one a candidate
    environment: str  # canonical JSON
    signatures: Signatures | None  # by what they are compared with each other, if they are


def account(store: Store, stream: StreamPlan, unit: int) -> UnitAccount | None:
    """Judge a unit from what is committed; None when its part or one of its scores is not there."""
    try:
        part = read_table(store, part_name(stream, unit), ["status"])
        scored = [
            read_table(store, scores_name(stream, f, unit), ["index", *f.method.columns()]).to_pylist()
            for f in stream.filters
        ]
        signatures = None
        if f := stream.pairwise:
            signatures = _signatures(read_table(store, scores_name(stream, f, unit), list(tables.SIGNATURE)))
    except FileNotFoundError:
        return None
    outcomes = [
        outcome(stream, status, [rows[place] for rows in scored])
        for place, status in enumerate(part.column("status").to_pylist())
    ]
    return UnitAccount(tuple(outcomes), part.schema.metadata[b"environment"].decode(), signatures)


def outcome(stream: StreamPlan, status: str, scores: Sequence[Mapping[str, float]]) -> str:
    """What a candidate turned out to be, as `pipeline.select` knows it."""
    if status != "ok":
        return FAILED
    return next((verdict.rule for verdict in judge(stream, scores) if not verdict.passed), PASSED)


def judge(stream: StreamPlan, scores: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """The verdict of each filter of a stream on one candidate, given its scores by each filter."""
    return [f.method.decide(row) for f, row in zip(stream.filters, scores, strict=True) if f.kind == "filter"]


def described(stream: StreamPlan) -> dict[str, Any]:
    """The metadata of a part that says what it is, for people who find it alone."""
    return {
        "version": tables.VERSION,
        "class": stream.label,
        "recipe": stream.recipe,
        "stream": stream.id,
    }
