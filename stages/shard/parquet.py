"""A Parquet file whose bytes depend on its rows and schema alone, under one version of pyarrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


INCOMPRESSIBLE = ("image",)


def write(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """The file of `rows`, in their order, with a checksum on every page.

    Encoded images are written as they are: they do not get smaller, and a reader need not copy them.

    Raises `ValueError` when a row lacks a column or has one that the schema does not know, and
    `pyarrow.ArrowInvalid` or `ArrowTypeError` when a value does not fit its column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = set(schema.names)
    for number, row in enumerate(rows):
        if row.keys() != names:
            raise ValueError(f"row {number}: columns {sorted(row.keys() ^ names)} are missing or unknown")
    table = pa.Table.from_pylist(rows, schema=schema)
    columns = [leaf for field in schema for leaf in _leaves(field)]
    plain = {leaf: "none" if leaf in INCOMPRESSIBLE else "zstd" for leaf in columns}
    file = pa.BufferOutputStream()
    pq.write_table(
        table,
        file,
        version="2.6",
        compression=plain,
        compression_level={leaf: 3 for leaf, codec in plain.items() if codec == "zstd"},
        use_dictionary=[leaf for leaf in columns if leaf not in INCOMPRESSIBLE],
        write_page_checksum=True,
    )
    return file.getvalue().to_pybytes()


def _leaves(field: pa.Field) -> list[str]:
    """The names that Parquet has for the columns of a field."""
    import pyarrow as pa

    return [f"{field.name}.list.element"] if pa.types.is_list(field.type) else [field.name]
