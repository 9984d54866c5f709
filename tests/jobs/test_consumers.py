"""The shards as their users read them: each with the library's own reader and nothing of ours.

The checks take a folder of shards (`000000.tar` with `000000.parquet`) and what must be in it, so they serve
any build.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
from PIL import Image

from tests.small_build import make_config

Expected = dict[str, tuple[bytes, int]]  # key -> bytes of the image file, class index


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def tars(shards: Path) -> list[str]:
    return [str(path) for path in sorted(shards.glob("*.tar"))]


def check_webdataset(shards: Path, expected: Expected) -> None:
    """In a DataLoader with two workers, as bytes and as decoded batches: every sample exactly once."""
    import webdataset
    from torch.utils.data import DataLoader

    raw = webdataset.WebDataset(tars(shards), shardshuffle=False)
    seen = list(DataLoader(raw, batch_size=None, num_workers=2))
    assert len(seen) == len(expected)
    assert {s["__key__"]: (s[suffix(s)], int(s["cls"])) for s in seen} == expected
    assert all(s["txt"] and json.loads(s["json"]) for s in seen)

    decoded = webdataset.WebDataset(tars(shards), shardshuffle=False).decode("torchrgb")
    batches = decoded.to_tuple("jpg;png", "cls", "__key__").batched(4)
    count = 0
    for image_B3hw, cls_B, keys in DataLoader(batches, batch_size=None, num_workers=2):
        count += len(keys)
        for image_3hw, cls, key in zip(image_B3hw, cls_B, keys, strict=True):
            levels = (image_3hw.permute(1, 2, 0) * 255).round().byte().numpy()
            assert np.array_equal(levels, pixels(expected[key][0]))
            assert cls == expected[key][1]
    assert count == len(expected)


def suffix(names) -> str:
    (found,) = {"jpg", "png", "webp"} & set(names)
    return found


def check_datasets(shards: Path, expected: Expected, cache: Path) -> None:
    import datasets

    table = datasets.load_dataset(
        "webdataset", data_files={"train": tars(shards)}, split="train", cache_dir=str(cache)
    )
    assert table.num_rows == len(expected)
    image = suffix(table.column_names)
    assert table.features["cls"].dtype == "int64"
    assert isinstance(table.features[image], datasets.Image)
    for row in table:
        data, cls = expected[row["__key__"]]
        assert np.array_equal(np.asarray(row[image]), pixels(data))
        assert row["cls"] == cls
    raw = table.cast_column(image, datasets.Image(decode=False))
    assert {row["__key__"]: (row[image]["bytes"], row["cls"]) for row in raw} == expected
    assert None not in [value for row in raw for value in row["json"].values()]


def check_ray(shards: Path, expected: Expected) -> None:
    import ray

    rows = ray.data.read_webdataset(tars(shards)).take_all()
    assert len(rows) == len(expected)
    for row in rows:
        data, cls = expected[row["__key__"]]
        assert np.array_equal(row[suffix(row)], pixels(data))
        assert row["cls"] == cls
        assert row["txt"]
        assert row["json"]


def check_pyarrow(shards: Path, expected: Expected) -> None:
    """The Parquet files as one table; then single images, by offset and length alone."""
    table = pyarrow.dataset.dataset([str(p) for p in sorted(shards.glob("*.parquet"))]).to_table()
    assert sorted(table["key"].to_pylist()) == sorted(expected)
    assert dict(zip(table["key"].to_pylist(), table["class_index"].to_pylist(), strict=True)) == {
        key: cls for key, (_, cls) in expected.items()
    }
    for path in sorted(shards.glob("*.parquet")):
        table = pyarrow.dataset.dataset(str(path)).to_table(["key", "shard", "offset", "length"])
        rows = table.to_pylist()
        assert {row["shard"] for row in rows} == {path.stem}
        with open(path.with_suffix(".tar"), "rb") as file:
            for row in rows:
                file.seek(row["offset"])
                assert file.read(row["length"]) == expected[row["key"]][0]


@pytest.fixture(scope="module")
def build(drawings, tmp_path_factory) -> tuple[Path, Expected]:
    """The shards of a small build, and what its parts hold of the accepted candidates."""
    from jobs.build import make_runner
    from pipeline.build import build, resolve, survey
    from pipeline.config import load
    from pipeline.parts import part_name, read_table
    from pipeline.telemetry import telemetry

    folder = tmp_path_factory.mktemp("build")
    config = load(make_config(folder, drawings, shard={"samples": 5, "window": 2}))
    result = build(config, telemetry("plain"), make_runner)
    store, plan = resolve(config)
    expected: Expected = {}
    for stream_id, selection in survey(store, plan, print).selections().items():
        stream = plan.by_id[stream_id]
        for number in selection.accepted.tolist():
            unit, place = divmod(number, stream.unit)
            candidate = read_table(store, part_name(stream, unit)).to_pylist()[place]
            expected[candidate["key"]] = (candidate["image"], stream.class_index)
    assert len(expected) == 18
    return folder / "out" / result.folder / "shards", expected


@pytest.fixture(scope="module")
def ray_here():
    """A Ray of one core that leaves nothing behind."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: a socket lies below it
        ray.init(num_cpus=1, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


def test_webdataset(build):
    check_webdataset(*build)


def test_datasets(build, tmp_path):
    check_datasets(*build, cache=tmp_path)


def test_ray_data(build, ray_here):
    check_ray(*build)


def test_pyarrow_and_a_single_image(build):
    check_pyarrow(*build)
