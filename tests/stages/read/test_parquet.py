import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import UserError


def saved(columns: dict, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def test_image_columns_of_every_type(pictures, write, read, tmp_path):
    data = list(pictures.values())[:3]
    columns = {
        "binary": pa.array(data, pa.binary()),
        "large": pa.array(data, pa.large_binary()),
        "struct": pa.array([{"bytes": d, "path": "a.jpg"} for d in data]),
    }
    label = pa.array(["owl"] * 3).dictionary_encode()
    write.file(f"{tmp_path}/a.parquet", saved(columns | {"label": label}))
    for name in columns:
        items, _ = read("parquet", tmp_path / "a.parquet", image=name)
        assert [(item.label, item.read()) for item in items] == [("owl", d) for d in data]


def test_origins_count_rows_through_row_groups(pictures, write, read, tmp_path):
    data = list(pictures.values())
    columns = {"image": data, "label": list(range(len(data)))}
    write.file(f"{tmp_path}/deep/a.parquet", saved(columns, row_group_size=3))
    write.file(f"{tmp_path}/deep/notes.txt", b"not Parquet")
    items, _ = read("parquet", tmp_path)
    expected = [(f"deep/a.parquet/{n:09d}", str(n), d) for n, d in enumerate(data)]
    assert [(item.origin, item.label, item.read()) for item in items] == expected


def test_classes_and_folders_that_are_columns(pictures, write, read, tmp_path):
    data = list(pictures.values())
    write.file(f"{tmp_path}/kind=owl/a.parquet", saved({"image": data[:2], "number": [1, 0]}))
    write.file(f"{tmp_path}/kind=fox/a.parquet", saved({"image": data[2:4], "number": [0, 5]}))
    items, _ = read("parquet", tmp_path, label="kind")
    assert [item.label for item in items] == ["fox", "fox", "owl", "owl"]
    items, admission = read("parquet", tmp_path, label="number", classes=["zero", "one"])
    assert [item.label for item in items] == ["zero", "", "one", "zero"]
    assert [q.reason for q in admission.quarantined] == ["the label 5 is no number from 0 to 1 of `classes`"]


def test_a_folder_above_the_source_is_no_column(pictures, write, read, tmp_path):
    data = next(iter(pictures.values()))
    write.file(f"{tmp_path}/label=owl/refs/a.parquet", saved({"image": [data]}))
    with pytest.raises(UserError, match=r"no column 'label'; it has image$"):
        read("parquet", tmp_path / "label=owl" / "refs")


def test_rows_without_image_or_label_are_counted_and_refused(pictures, write, read, tmp_path):
    data = next(iter(pictures.values()))
    images = pa.array([{"bytes": data}, {"bytes": None}, None, {"bytes": data}])
    write.file(f"{tmp_path}/a.parquet", saved({"image": images, "label": ["owl", "owl", "owl", None]}))
    items, admission = read("parquet", tmp_path)
    assert len(items) == 4
    assert [r.origin for r in admission.admitted] == ["a.parquet/000000000"]
    assert [q.reason for q in admission.quarantined] == [
        "no image in the row",
        "no image in the row",
        "no label",
    ]


def test_a_wrong_column_is_named_with_what_there_is(pictures, write, read, tmp_path):
    data = next(iter(pictures.values()))
    write.file(f"{tmp_path}/a.parquet", saved({"picture": [data], "label": ["owl"]}))
    with pytest.raises(UserError, match=r"references\.image: .* no column 'image'; it has picture, label"):
        read("parquet", tmp_path)
    with pytest.raises(UserError, match=r"references\.label: .* no column 'cls'; it has picture, label"):
        read("parquet", tmp_path, image="picture", label="cls")
    with pytest.raises(
        UserError, match=r"references\.image: column 'label' holds string; it must hold binary"
    ):
        read("parquet", tmp_path, image="label")


def test_what_is_no_parquet_or_has_no_rows_is_named(write, read, tmp_path):
    write.file(f"{tmp_path}/bad.parquet", b"PAR1 not really")
    with pytest.raises(UserError, match="is no Parquet data"):
        read("parquet", tmp_path)
    none = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}
    write.file(f"{tmp_path}/none/a.parquet", saved(none))
    with pytest.raises(UserError, match="has no rows"):
        read("parquet", tmp_path / "none")
