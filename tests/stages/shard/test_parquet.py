import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from stages.shard import parquet

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        ("class", pa.dictionary(pa.int32(), pa.string())),
        ("score", pa.float64()),
        ("parents", pa.list_(pa.field("element", pa.string()))),  # the name that Parquet gives it
        ("image", pa.binary()),
    ],
    metadata={"version": "1"},
)


def rows(count: int) -> list[dict]:
    return [
        {
            "key": f"k{n:05d}",
            "class": ("owl", "fox")[n % 2],
            "score": None if n % 7 == 0 else n / 3,
            "parents": [f"p{m}" for m in range(n % 4)],
            "image": bytes([n % 256]) * (n % 50),
        }
        for n in range(count)
    ]


def test_rows_and_schema_come_back():
    table = pq.read_table(io.BytesIO(parquet.write(rows(500), SCHEMA)), page_checksum_verification=True)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table.to_pylist() == rows(500)


def test_no_rows_are_a_table_too():
    table = pq.read_table(io.BytesIO(parquet.write([], SCHEMA)))
    assert table.num_rows == 0
    assert table.schema.equals(SCHEMA)


def test_bytes_depend_on_the_rows_alone(tmp_path):
    data = parquet.write(rows(300), SCHEMA)
    turned = [dict(reversed(list(row.items()))) for row in rows(300)]
    assert parquet.write(turned, SCHEMA) == data
    code = (
        "import sys, pyarrow as pa; from stages.shard import parquet;"
        "s = pa.schema([('n', pa.int64()), ('t', pa.string())]);"
        "sys.stdout.buffer.write(parquet.write([{'n': n, 't': str(n % 9)} for n in range(3000)], s))"
    )
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(2)]
    assert run[0].stdout == run[1].stdout
    assert run[0].stdout[:4] == b"PAR1"


def test_a_flipped_byte_in_a_page_is_found():
    noise = [row | {"image": str(row).encode()} for row in rows(200)]
    data = parquet.write(noise, SCHEMA)
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(4)
    assert column.path_in_schema == "image"
    start = column.dictionary_page_offset or column.data_page_offset
    at = start + column.total_compressed_size - 20
    damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(io.BytesIO(damaged), page_checksum_verification=True)


@pytest.mark.parametrize("change", [{"extra": 1}, {"score": ...}])
def test_a_row_with_other_columns_is_refused(change):
    row = {k: v for k, v in (rows(1)[0] | change).items() if v is not ...}
    with pytest.raises(ValueError, match=rf"row 1: columns \['{next(iter(change))}'\]"):
        parquet.write([rows(1)[0], row], SCHEMA)


def test_a_value_of_another_type_is_refused():
    with pytest.raises(pa.ArrowException):
        parquet.write([rows(1)[0] | {"score": "high"}], SCHEMA)
    with pytest.raises(pa.ArrowException):
        parquet.write([rows(1)[0] | {"image": 7}], SCHEMA)


def test_many_files_are_one_dataset(tmp_path):
    for number in range(3):
        (tmp_path / f"{number:06d}.parquet").write_bytes(parquet.write(rows(10 + number), SCHEMA))
    dataset = pyarrow.dataset.dataset(tmp_path, format="parquet")
    assert dataset.count_rows() == 33
    owls = dataset.to_table(filter=pyarrow.dataset.field("score") > 3, columns=["score"])
    assert min(owls["score"].to_pylist()) > 3
