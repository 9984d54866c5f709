from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import registry
from stages.read.admit import admit

Pictures = dict[tuple[str, str], bytes]  # (label, file name) -> bytes


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """Seven pictures of two classes in three formats; one class has a name that needs care."""
    rng = np.random.default_rng(3)
    made = {}
    for label, count in (("red_star", 4), ("Zürich tram", 3)):
        for number in range(count):
            file_format = ("JPEG", "PNG", "WEBP")[number % 3]
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, file_format)
            extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[file_format]
            made[label, f"{number}.{extension}"] = file.getvalue()
    return made


def _tar(files: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


class Write:
    """Writes pictures under a URI in the layout of each source, with nothing of the code under test."""

    tar = staticmethod(_tar)

    @staticmethod
    def file(uri: str, data: bytes) -> None:
        with fsspec.open(uri, "wb", auto_mkdir=True) as file:
            file.write(data)

    @classmethod
    def imagefolder(cls, uri: str, pictures: Pictures) -> None:
        for (label, name), data in pictures.items():
            cls.file(f"{uri}/{label}/{name}", data)

    @classmethod
    def webdataset(cls, uri: str, pictures: Pictures) -> None:
        """Two tars; the label as text in .txt and .json and as a number in .cls."""
        labels = sorted({label for label, _ in pictures})
        shards: list[list[tuple[str, bytes]]] = [[], []]
        for number, ((label, name), data) in enumerate(pictures.items()):
            key = f"{number:04d}"
            shards[number % 2] += [
                (f"{key}.{name.split('.')[1]}", data),
                (f"{key}.cls", str(labels.index(label)).encode()),
                (f"{key}.txt", label.encode()),
                (f"{key}.json", json.dumps({"class": label, "n": number}).encode()),
            ]
        for number, files in enumerate(shards):
            cls.file(f"{uri}/{number:06d}.tar", _tar(files))

    @classmethod
    def parquet(cls, uri: str, pictures: Pictures) -> None:
        """Plain binary in one file, the struct of Hugging Face in the other; row groups of two rows."""
        rows = list(pictures.items())
        half = len(rows) // 2
        tables = [
            pa.table({"image": [data for _, data in rows[:half]], "label": [p[0] for p, _ in rows[:half]]}),
            pa.table({"image": [data for _, data in rows[half:]], "label": [p[0] for p, _ in rows[half:]]}),
        ]
        for number, table in enumerate(tables):
            file = io.BytesIO()
            pq.write_table(table, file, row_group_size=2)
            cls.file(f"{uri}/{number}.parquet", file.getvalue())

    @staticmethod
    def huggingface(uri: str, pictures: Pictures) -> None:
        import datasets

        labels = sorted({label for label, _ in pictures})
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=labels)}
        columns = {
            "image": [{"bytes": data, "path": None} for data in pictures.values()],
            "label": [labels.index(label) for label, _ in pictures],
        }
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        datasets.DatasetDict({"train": table}).save_to_disk(uri)


@pytest.fixture(scope="session")
def write() -> type[Write]:
    return Write


@pytest.fixture
def memory():
    """A fresh folder in memory."""
    fs = fsspec.filesystem("memory")
    fs.makedirs("/refs", exist_ok=True)
    yield "memory://refs"
    fs.rm("/refs", recursive=True)


@pytest.fixture(autouse=True, scope="session")
def _own_hub_cache(tmp_path_factory):
    """Nothing of `datasets` outside the test's own folders, and no look at the network."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def read():
    """`read("parquet", uri, image="jpg")` -> the items, and what admission makes of them."""

    def run(kind: str, uri: str | Path, **settings):
        method = registry.resolve("read", kind)
        config = method.Config(uri=str(uri), **settings)
        items = list(method(config).items())
        return items, admit(items, config)

    return run
