"""A Parquet file whose bytes depend on its rows and schema alone, under one version of pyarrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def write(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """The file of `rows`, in their order, with a checksum on every page.

    Raises `ValueError` when a row lacks a column or has one that the schema does not know, and
    `pyarrow.ArrowInvalid` or `ArrowTypeError` when a value does not fit its column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = set(schema.names)
    for number, row in enumerate(rows):
        if row.keys() != names:
            raise ValueError(f"row {number}: columns {sorted(row.keys() ^ names)} are missing or unknown")
    file = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        file,
        version="2.6",
        compression="zstd",
        compression_level=3,
        write_page_checksum=True,
    )
    return file.getvalue().to_pybytes()
