"""Parts, scores, seeds and artifacts notice their own damage: a changed byte is told, or changes nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipeline import parts, tensors
from pipeline.parts import read_table, to_parquet
from pipeline.store import Store
from schemas import tables
from schemas.errors import Damaged, UserError
from schemas.ids import sha256

NAME = "parts/stream/000000.parquet"


def part_rows():
    blank = dict.fromkeys(tables.PART.names)
    for index in range(4):
        image = bytes([index]) * 300 if index != 2 else None
        yield blank | {
            "index": index, "key": f"star-plain-{index:06d}", "status": "ok" if image else "failed",
            "error": None if image else "ValueError: poison", "prompt": "a photo of a star",
            "parents": ["a" * 64, "b" * 64], "weights": [0.25, 0.75], "refine_losses": [float("nan"), 1e-300],
            "artifacts": ["c" * 20], "generate_trace": [0.5],
            "seed_norm": 1.0, "image": image, "image_sha256": sha256(image) if image else None,
        }  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def data():
    return to_parquet(
        list(part_rows()), tables.PART, {"version": tables.VERSION, "environment": {"torch": "2"}}
    )


def every_changed_byte(data: bytes, step: int):
    for at in range(0, len(data), step):
        for mask in (0x01, 0x80):
            yield data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def test_a_part_comes_back(store, data):
    store.put_new(NAME, data)
    table = read_table(store, NAME)
    assert repr(table.to_pylist()) == repr(list(part_rows()))  # repr: nan is not equal to itself
    assert read_table(store, NAME, ["status", "index"]).column_names == ["status", "index"]
    assert (
        to_parquet(list(part_rows()), tables.PART, {"version": tables.VERSION, "environment": {"torch": "2"}})
        == data
    )


def test_a_changed_byte_of_a_part_is_told_or_harmless(tmp_path, store, data):
    """Harmless are bytes that Parquet has for others, such as statistics and padding."""
    store.put_new(NAME, data)
    whole, metadata = read_table(store, NAME), read_table(store, NAME).schema.metadata
    told = []
    changes = list(every_changed_byte(data, 37))
    for changed in changes:
        Path(tmp_path, NAME).write_bytes(changed)
        try:
            table = read_table(store, NAME)
        except Damaged as error:
            told.append(str(error))
        else:
            assert repr(table.to_pylist()) == repr(whole.to_pylist())
            assert table.schema.metadata == metadata
    assert len(told) > len(changes) / 2
    assert all(NAME in line and "\n" not in line for line in told)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_truncated_part_is_told(tmp_path, store, data, cut):
    store.put_new(NAME, data[:cut])
    with pytest.raises(Damaged, match="remove it and build again"):
        read_table(store, NAME)


def test_another_image_is_told_though_its_page_is_whole(store):
    rows = list(part_rows())
    rows[1]["image"] = b"another"
    store.put_new(NAME, to_parquet(rows, tables.PART, {"version": tables.VERSION}))
    with pytest.raises(Damaged, match="image"):
        read_table(store, NAME)
    read_table(store, NAME, ["status"])  # does not read images


def test_trouble_of_the_store_is_no_damage(store, data, monkeypatch):
    """Or a person would be told to remove what is whole."""
    store.put_new(NAME, data)
    for error in (OSError(5, "Input/output error"), TimeoutError("slow"), PermissionError(13, "denied")):
        monkeypatch.setattr(store.fs, "open", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            read_table(store, NAME)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        read_table(store, "parts/none")


def test_a_newer_format_is_refused(store):
    schema = pa.schema([pa.field("invented", pa.string())])
    store.put_new(NAME, to_parquet([{"invented": "x"}], schema, {"version": tables.VERSION + 1}))
    with pytest.raises(UserError, match="newer seedloom") as caught:
        read_table(store, NAME)
    assert not isinstance(caught.value, Damaged)


def test_bytes_of_a_part_do_not_depend_on_what_its_file_is_called():
    assert "hostname" not in parts.environment("cpu", "float32")
    assert parts.environment("cpu", "float32")["device"].startswith("cpu ")


def test_tensors_come_back(store):
    made = {"z_CHW": torch.randn(4, 8, 8), "other": torch.zeros(2, dtype=torch.float16)}
    store.put_new("seeds/x", tensors.to_safetensors(made, {"psnr": 31.5, "lag": float("nan")}))
    found = tensors.read_tensors(store, "seeds/x")
    assert found.keys() == made.keys()
    assert all(
        torch.equal(found[name], made[name]) and found[name].dtype == made[name].dtype for name in made
    )
    assert len({tensors.to_safetensors(made, {"psnr": 31.5, "lag": 0.1}) for _ in range(8)}) == 1


def test_a_changed_byte_of_tensors_is_told_or_harmless(tmp_path, store):
    made = {"z_CHW": torch.randn(2, 4, 4)}
    data = tensors.to_safetensors(made, {"psnr": 31.5})
    store.put_new("seeds/x", data)
    told, changes = [], list(every_changed_byte(data, 3))
    for changed in changes:
        Path(tmp_path, "seeds/x").write_bytes(changed)
        try:
            found = tensors.read_tensors(store, "seeds/x")
        except Damaged as error:
            told.append(str(error))
        else:
            assert torch.equal(found["z_CHW"], made["z_CHW"])
    assert len(told) > 0.8 * len(changes)
    assert all("seeds/x" in line for line in told)


def test_a_truncated_seed_is_told(tmp_path, store):
    data = tensors.to_safetensors({"z_CHW": torch.randn(2, 4, 4)})
    for cut in (0, 4, 60, len(data) - 1):
        Path(tmp_path, "seed").write_bytes(data[:cut])
        with pytest.raises(Damaged):
            tensors.read_tensors(store, "seed")
