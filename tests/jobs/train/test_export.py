"""A build as others read it: exported for `datasets`, and through Ray Data into a training of Ray Train."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from jobs.train.dataset import open_dataset
from tests.small_build import CLASSES


def pixels_of(built: Path) -> dict[str, tuple[int, np.ndarray]]:
    """Key → class index and pixels, as our own loader has them."""
    dataset = open_dataset(str(built))
    items = [dataset[i] for i in range(len(dataset))]
    return {item["key"]: (item["label"], item["image"].permute(1, 2, 0).numpy()) for item in items}


@pytest.fixture(scope="module")
def exported(built, tmp_path_factory) -> Path:
    from jobs.train.export import export

    folder = tmp_path_factory.mktemp("export") / "shapes"
    export(str(built), folder, license="cc-by-4.0")
    return folder


def test_datasets_reads_the_folder_with_the_features_of_its_card(built, exported, tmp_path):
    import datasets

    table = datasets.load_dataset(str(exported), split="train", cache_dir=str(tmp_path))
    assert table.features["cls"] == datasets.ClassLabel(names=list(CLASSES))
    expected = pixels_of(built)
    assert sorted(table["__key__"]) == sorted(expected)
    for row in table:
        label, pixels = expected[row["__key__"]]
        assert row["cls"] == label
        assert row["json"]["class"] == CLASSES[label]
        assert np.array_equal(np.asarray(row["jpg"]), pixels)
    metadata = datasets.load_dataset(
        "parquet", data_files=str(exported / "metadata" / "*.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert sorted(metadata["key"]) == sorted(expected)


def test_the_card_says_licence_size_and_classes(exported):
    _, front, text = (exported / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "cc-by-4.0"
    assert card["size_categories"] == ["n<1K"]
    assert "image-classification" in card["task_categories"]
    assert card["configs"][0]["data_files"] == [{"split": "train", "path": "shards/*.tar"}]
    assert "39 images of 3 classes" in text
    assert "| gear | 1 | plain | 6 | a photo of a gear |" in text or "| gear | 1 | plain | 7 |" in text


def test_what_cannot_be_exported(own, tmp_path, seedloom):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "is not empty" in seedloom("export", own, tmp_path / "full", "--license", "mit").err
    ended = seedloom("export", own, tmp_path / "new", "--license", "other")
    assert (ended.code, "--license-name" in ended.err) == (2, True)
    next((own / "builds").glob("*/shards/000003.tar")).write_bytes(b"")
    ended = seedloom("export", own, tmp_path / "new", "--license", "mit")
    assert (ended.code, "000003.tar: damaged" in ended.err) == (4, True)
    assert not list(tmp_path.glob("new*"))


def test_ray_data_and_ray_train(built, tmp_path):
    """The README's way: a worker of a `TorchTrainer` gets every sample once."""
    import ray
    import ray.train.torch

    expected = pixels_of(built)
    tars = sorted(str(path) for path in built.glob("builds/*/shards/*.tar"))

    def train() -> None:
        shard = ray.train.get_dataset_shard("train")
        keys, right = [], True
        for batch in shard.iter_batches(batch_size=8):
            keys += [str(key) for key in batch["__key__"]]
            for key, label, pixels in zip(batch["__key__"], batch["cls"], batch["jpg"], strict=True):
                right &= label == expected[key][0] and np.array_equal(pixels, expected[key][1])
        (tmp_path / "seen.json").write_text(json.dumps({"keys": keys, "right": bool(right)}))

    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: a socket lies below it
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        try:
            trainer = ray.train.torch.TorchTrainer(
                train,
                datasets={"train": ray.data.read_webdataset(tars)},
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(storage_path=str(tmp_path / "runs")),
            )
            trainer.fit()
        finally:
            ray.shutdown()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert sorted(seen["keys"]) == sorted(expected)
    assert seen["right"]
