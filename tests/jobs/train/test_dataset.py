"""Datasets of a real build: what is read, by whom, in which order, and what becomes of damage."""

from __future__ import annotations

import io
import logging
import os
import pickle
import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset
import pytest
import torch
from PIL import Image

from jobs.train.dataset import open_dataset
from pipeline.ledger import named
from pipeline.store import Store
from schemas.errors import Damaged, UserError
from schemas.ids import sha256
from tests.jobs.train.conftest import PER_CLASS
from tests.small_build import CLASSES

ROOT = Path(__file__).parents[3]


def shards(output: Path) -> Path:
    return output / "builds" / named(Store(str(output))).build_id / "shards"


def rows_of(output: Path, where=None) -> dict[str, dict]:
    """Key → row of the Parquet beside the shards, as pyarrow reads and filters it."""
    files = [str(path) for path in sorted(shards(output).glob("*.parquet"))]
    return {row["key"]: row for row in pyarrow.dataset.dataset(files).to_table(filter=where).to_pylist()}


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_sample_is_what_the_build_says(built):
    dataset, rows = open_dataset(str(built)), rows_of(built)
    assert dataset.classes == CLASSES
    assert dataset.images_per_epoch == dict.fromkeys(CLASSES, PER_CLASS)
    seen = [dataset[i] for i in range(len(dataset))]
    assert sorted(item["key"] for item in seen) == sorted(rows)
    for item in seen:
        row = rows[item["key"]]
        tar = (shards(built) / f"{row['shard']}.tar").read_bytes()
        stored = Image.open(io.BytesIO(tar[row["offset"] : row["offset"] + row["length"]]))
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), np.asarray(stored))
        assert (item["label"], item["real"]) == (row["class_index"], False)


def test_two_ranks_with_two_workers_each_see_every_sample_once(built):
    """Shards are uneven and 39 is odd: one sample is repeated, so that both have five batches."""
    loaders = [
        open_dataset(str(built)).loader(4, rank=rank, world_size=2, num_workers=2) for rank in range(2)
    ]
    for _ in range(2):
        batches = [list(loader) for loader in loaders]
        assert [len(b) for b in batches] == [5, 5] == [len(loader) for loader in loaders]
        counts = Counter(keys(batches[0]) + keys(batches[1]))
        assert set(counts) == set(rows_of(built))
        assert sum(counts.values()) == 40


def test_the_order_does_not_depend_on_workers(built):
    orders = [keys(open_dataset(str(built)).loader(4, num_workers=workers)) for workers in (0, 1, 3)]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_on_in_mid_epoch(built, workers):
    def loader(**changes):
        return open_dataset(str(built), real=0.3, rng_seed=5).loader(
            **{"batch_size": 4, "rank": 1, "world_size": 2, "num_workers": workers} | changes
        )

    whole = loader()
    expected = [[batch["key"] for batch in whole] for _ in range(2)]
    assert expected[0] != expected[1]

    killed = loader()
    for number, _ in enumerate(killed):
        if number == 2:
            state = pickle.loads(pickle.dumps(killed.state_dict()))
            break
    revived = loader()
    revived.load_state_dict(state)
    assert [batch["key"] for batch in revived] == expected[0][3:]
    assert [batch["key"] for batch in revived] == expected[1]
    assert [batch["key"] for batch in killed] == expected[0][3:]  # after a break, too
    revived.set_epoch(0)
    assert [batch["key"] for batch in revived] == expected[0]

    with pytest.raises(UserError, match="batch_size 4, this one has 3"):
        loader(batch_size=3).load_state_dict(state)
    with pytest.raises(UserError, match="world_size 2, this one has 4"):
        loader(world_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    "where",
    [
        pc.field("tests_small_build_HashFilter_fraction") > 0.75,
        (pc.field("recipe") == "plain") & pc.field("class").isin(["gear", "ring"]),
    ],
    ids=["score", "method and class"],
)
def test_a_subset_is_that_of_the_table(built, where):
    expected = rows_of(built, where)
    assert 0 < len(expected) < 3 * PER_CLASS
    assert sorted(keys(open_dataset(str(built), where=where).loader(5))) == sorted(expected)


def test_a_subset_that_makes_no_sense(built):
    with pytest.raises(UserError, match=r"where=.*no_such.*the columns are key \(string\)"):
        open_dataset(str(built), where=pc.field("no_such") > 1)
    with pytest.raises(UserError, match="the columns are"):
        open_dataset(str(built), where=pc.field("recipe") > 1.5)
    with pytest.raises(UserError, match="no image is left of the 39 samples"):
        open_dataset(str(built), where=pc.field("recipe") == "none")


def test_kept_references_in_their_share(built, drawings):
    """0.25 of circles: 13·1/3 ≈ 4; half of gears: 13, each of the four 3 or 4 times; rings: all four once."""
    dataset = open_dataset(str(built), real={"circle": 0.25, "gear": 0.5})
    seen = [item for batch in dataset.loader(8) for item in zip(*batch.values(), strict=True)]
    real = Counter((key, int(label)) for _, label, key, is_real in seen if is_real)
    expected = {
        (sha256(path.read_bytes()), CLASSES.index(path.parent.name)) for path in drawings.glob("*/*.png")
    }
    assert set(real) == expected
    per_class = {c: sorted(n for (_, label), n in real.items() if label == c) for c in range(3)}
    assert per_class == {0: [1] * 4, 1: [3, 3, 3, 4], 2: [1] * 4}
    pictures = {sha256(path.read_bytes()): Image.open(path) for path in drawings.glob("*/*.png")}
    for image, _, key, is_real in seen:
        if is_real:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(pictures[key].convert("RGB")))
    assert Counter(key for _, _, key, is_real in seen if not is_real) == Counter(list(rows_of(built)))


def test_real_images_of_a_folder(built, drawings, tmp_path, caplog):
    """A class that the build lacks is numbered after its own and is all real; one without is synthetic."""
    shutil.copytree(drawings / "gear", tmp_path / "real" / "gear")
    shutil.copytree(drawings / "ring", tmp_path / "real" / "anchor")
    dataset = open_dataset(str(built), real=0.5, references=str(tmp_path / "real"))
    assert dataset.classes == (*CLASSES, "anchor")
    assert dataset.images_per_epoch == {"circle": 13, "gear": 26, "ring": 13, "anchor": 4}
    real = Counter(
        (int(label), key)
        for batch in dataset.loader(8)
        for label, key, is_real in zip(batch["label"], batch["key"], batch["real"], strict=True)
        if is_real
    )
    assert {key for label, key in real if label == 3} == {f"anchor/{i:04d}.png" for i in range(4)}
    assert sum(n for (label, _), n in real.items() if label == 1) == 13
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "2 classes have no real images, so all are synthetic: circle, ring",
        "1 classes have no synthetic images, so all are real: anchor",
    ]


@pytest.mark.parametrize("real", [{"dog": 0.5}, 1.5, -0.1, "half", {"gear": "never"}, float("nan")])
def test_a_share_that_makes_no_sense(built, real):
    with pytest.raises(UserError, match=r"^real: "):
        open_dataset(str(built), real=real)


def test_a_build_that_keeps_no_references(own):
    shutil.rmtree(own / "references")
    with pytest.raises(UserError, match="keeps none of its 12 references"):
        open_dataset(str(own), real=0.5)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "000002.tar: is missing"),
        (lambda path: os.truncate(path, 700), "000002.tar: damaged .700 bytes of"),
        (lambda path: path.with_suffix(".parquet").unlink(), "000002.parquet: is missing"),
        (lambda path: flip(path.with_suffix(".parquet"), 900), "000002.parquet: damaged"),
    ],
    ids=["no tar", "short tar", "no Parquet", "flipped Parquet"],
)
def test_a_shard_that_is_missing_or_damaged(own, harm, says, caplog):
    """It is one line, or the others make up an epoch of their own, with as many batches on each rank."""
    lost = {key for key, row in rows_of(own).items() if row["shard"] == "000002"}
    harm(shards(own) / "000002.tar")
    with pytest.raises(Damaged, match=says) as raised:
        open_dataset(str(own))
    assert "\n" not in str(raised.value)
    datasets = [open_dataset(str(own), damaged="skip") for _ in range(2)]
    assert says[:6] in caplog.text
    loaders = [dataset.loader(4, rank=rank, world_size=2) for rank, dataset in enumerate(datasets)]
    seen = [list(loader) for loader in loaders]
    assert len(seen[0]) == len(seen[1]) == 5  # 34 samples
    assert set(keys(seen[0] + seen[1])) == set(rows_of_rest(built_rows=datasets[0], lost=lost))


def rows_of_rest(built_rows, lost: set[str]) -> list[str]:
    kept = built_rows.table["key"].to_pylist()
    assert len(kept) == 3 * PER_CLASS - 5
    assert not set(kept) & lost
    return kept


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_damaged_when_it_is_read(own, workers, caplog):
    """Its shard looks whole at opening. Another image of the class stands in its place, or it is one line."""
    key, row = next(iter(rows_of(own).items()))
    flip(shards(own) / f"{row['shard']}.tar", row["offset"] + row["length"] // 2)
    with pytest.raises(Damaged, match=f"{row['shard']}.tar: damaged .{key} is not the image") as raised:
        list(open_dataset(str(own)).loader(4, num_workers=workers))
    assert "\n" not in str(raised.value)

    dataset = open_dataset(str(own), damaged="skip")
    batches = list(dataset.loader(4, num_workers=workers))
    assert [len(batch["key"]) for batch in batches] == [4] * 9 + [3]
    assert key not in keys(batches)
    assert set(keys(batches)) == set(rows_of(own)) - {key}
    labels = Counter(int(label) for batch in batches for label in batch["label"])
    assert labels == {0: PER_CLASS, 1: PER_CLASS, 2: PER_CLASS}
    if not workers:  # those have their own
        assert [r.getMessage().partition(":")[0] for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture
def remote(built):
    """The build in a store that is no folder."""
    fs, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for path in built.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(built)}", path.read_bytes())
    yield f"memory:/{root}"
    fs.store.clear()


def test_remote_shards_are_copied_once(remote, tmp_path):
    """The second epoch needs the store no more; nor does a second process that shares the cache."""
    fs = fsspec.filesystem("memory")
    first = open_dataset(remote, real=0.5, cache=tmp_path / "cache")
    second = open_dataset(remote, real=0.5, cache=tmp_path / "cache")
    loader = first.loader(4)
    expected = [keys(loader)]
    fs.store.clear()
    expected.append(keys(loader))
    assert set(expected[0]) == set(expected[1])
    again = second.loader(4)
    assert [keys(again), keys(again)] == expected
    copies = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.suffix]
    assert all(sha256(path.read_bytes()) == path.name for path in copies)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_processes_share_a_cold_cache(remote, tmp_path):
    dataset = open_dataset(remote, cache=tmp_path / "cache")
    assert sorted(keys(dataset.loader(3, num_workers=2))) == sorted(dataset.table["key"].to_pylist())


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_named(remote, tmp_path):
    fs, cache = fsspec.filesystem("memory"), tmp_path / "cache"
    dataset = open_dataset(remote, cache=cache)
    expected = sorted(keys(dataset.loader(4)))
    for shard in dataset.manifest.shards:
        flip(cache / shard.tar_sha256[:2] / shard.tar_sha256, 700)
    assert sorted(keys(dataset.loader(4))) == expected

    shutil.rmtree(cache)
    name = f"builds/{dataset.manifest.build_id}/shards/000001.tar"
    path = f"{remote.removeprefix('memory:/')}/{name}"
    data = bytearray(fs.cat_file(path))
    data[700] ^= 1
    fs.pipe_file(path, bytes(data))
    with pytest.raises(Damaged, match=r"000001.tar: damaged \(its content is not what its hash says"):
        list(open_dataset(remote, cache=cache).loader(4))
    with pytest.raises(UserError, match="cannot be written"):
        open_dataset(remote, cache="/dev/null/cache")


def test_loaders_that_make_no_sense(built):
    dataset = open_dataset(str(built))
    for wrong in ({"batch_size": 0}, {"rank": 2, "world_size": 2}, {"last": "pad"}, {"window": 0}):
        with pytest.raises(UserError, match=r"^loader: "):
            dataset.loader(**{"batch_size": 4} | wrong)
    with pytest.raises(UserError, match="39 images has no batch of 8 for each of 5 ranks"):
        dataset.loader(8, rank=0, world_size=5, last="drop")
    with pytest.raises(UserError, match="no complete build 'nope'"):
        open_dataset(str(built), build="nope")


TWO_PROCESSES = """
import json, sys
import torch.distributed as dist
from jobs.train.dataset import open_dataset

dist.init_process_group("gloo")
dataset = open_dataset(sys.argv[1], real=0.5, damaged="skip")
loader = dataset.loader(4, num_workers=2, last="drop")
epochs = [[batch["key"] for batch in loader] for _ in range(2)]
with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as file:
    json.dump(epochs, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_of_torchrun(built, own, tmp_path):
    """Their batches are equally many, complete and disjoint; the rank is found without being named."""
    import json

    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "program.py", own, tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        batches = [rank[epoch] for rank in ranks]
        assert [[len(batch) for batch in own] for own in batches] == [[4] * 9] * 2  # 78 images: 39 and 39
        counts = Counter(key for own in batches for batch in own for key in batch)
        synthetic = {key: n for key, n in counts.items() if key in rows_of(built)}
        assert set(synthetic.values()) == {1}
        assert sum(counts.values()) == 72


def test_a_transform_and_a_sampler_of_ones_own(built):
    dataset = open_dataset(str(built), transform=lambda image: torch.tensor(image.size))
    sampler = torch.utils.data.SequentialSampler(dataset)
    batch = next(iter(torch.utils.data.DataLoader(dataset, 39, sampler=sampler)))
    assert batch["image"].tolist() == [[64, 64]] * 39
    assert batch["key"] == dataset.table["key"].to_pylist()
