"""Parts and scores: the committed output of a unit, and of scoring it with one filter."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.plan import FilterPlan, StreamPlan
from pipeline.select import FAILED, PASSED
from pipeline.store import Store
from schemas import tables
from schemas.errors import Damaged, UserError
from schemas.ids import canonical
from schemas.records import Verdict
from stages.shard import parquet


def part_name(stream: StreamPlan, unit: int) -> str:
    return f"parts/{stream.id}/{unit:06d}.parquet"


def scores_name(stream: StreamPlan, chosen: FilterPlan, unit: int) -> str:
    return f"scores/{stream.id}/{chosen.id}/{unit:06d}.parquet"


@cache
def environment(device: str) -> dict[str, str]:
    """What the bits of a result may depend on besides its fingerprint."""
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
        "pyarrow",
    )
    kind = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device": f"{device} {kind}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def to_parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, metadata: Mapping[str, Any]) -> bytes:
    """Rows as Parquet bytes, deterministic; `metadata` values are written as canonical JSON."""
    return parquet.write(rows, schema.with_metadata({k: canonical(v) for k, v in metadata.items()}))


def _open(store: Store, name: str) -> pq.ParquetFile:
    """A Parquet object for reading some of its columns. Raises `FileNotFoundError` and `Damaged`."""
    file = store.fs.open(store.path(name), "rb")
    try:
        opened = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise Damaged(f"{store.uri}/{name}: damaged ({error}); remove it and build again") from error
    version = int((opened.schema_arrow.metadata or {}).get(b"version", b"0"))
    if version > tables.VERSION:
        raise UserError(
            f"{store.uri}/{name}: written by a newer seedloom (format {version}); upgrade to read it"
        )
    return opened


def read_table(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return _open(store, name).read(columns=list(columns) if columns is not None else None)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise Damaged(f"{store.uri}/{name}: damaged ({error}); remove it and build again") from error


@dataclass(frozen=True)
class UnitAccount:
    """What selection and the manifest need to know of a committed and scored unit."""

    outcomes: tuple[str, ...]  # one a candidate
    environment: str  # canonical JSON


def account(store: Store, stream: StreamPlan, unit: int) -> UnitAccount | None:
    """Judge a unit from what is committed; None when its part or one of its scores is not there."""
    try:
        part = _open(store, part_name(stream, unit))
        scored = [read_table(store, scores_name(stream, f, unit)).to_pylist() for f in stream.filters]
    except FileNotFoundError:
        return None
    table = part.read(columns=["status"])
    verdicts = []
    for place, status in enumerate(table.column("status").to_pylist()):
        if status != "ok":
            verdicts.append(FAILED)
            continue
        rows = [rows[place] for rows in scored]
        verdicts.append(next((v.rule for v in judge(stream, rows) if not v.passed), PASSED))
    return UnitAccount(tuple(verdicts), (part.schema_arrow.metadata or {})[b"environment"].decode())


def judge(stream: StreamPlan, scores: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """The verdict of each filter of a stream on one candidate, given its scores by each filter."""
    return [f.method.decide(row) for f, row in zip(stream.filters, scores, strict=True)]


def described(stream: StreamPlan) -> dict[str, Any]:
    """The metadata of a part that says what it is, for people who find it alone."""
    return {
        "version": tables.VERSION,
        "class": stream.label,
        "recipe": stream.recipe,
        "stream": stream.id,
    }
