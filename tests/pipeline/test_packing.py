"""Packing: each part is read once, shards are written side by side, and neither shows in their bytes."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest

from pipeline import pack
from pipeline.build import resolve, survey
from pipeline.config import load
from pipeline.store import Store
from tests.local_build import HASH, config, run
from tests.small_build import shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


@pytest.fixture
def built(tmp_path):
    """A build of six shards in three tasks, from parts of three classes."""
    path = config(tmp_path, recipes={"plain": sketch_recipe()}, filter=[{"method": HASH, "least": 0.3}],
                  targets=[{"classes": ["circle", "gear", "ring"], "accepted": 8}],
                  shard={"samples": 4, "window": 2})  # fmt: skip
    return path, run(path).manifest


def planned(path):
    """The plan of the build, and its packing tasks."""
    store, plan = resolve(load(path))
    return plan, list(pack.plan_shards(plan, survey(store, plan, print).selections()))


def written_again(path, folder, plan, tasks, order=None):
    """All shards once more, into an empty store with the same parts."""
    (folder / "parts").parent.mkdir(exist_ok=True)
    for name in ("parts", "scores"):
        (folder / name).symlink_to(path.parent / "out" / name)
    store = Store(str(folder))
    receipts = [pack.write_shards(store, plan, tasks[i]) for i in order or range(len(tasks))]
    return {f"{r.name}": (r.tar_sha256, r.parquet_sha256) for task in receipts for r in task}


def test_each_part_and_its_scores_are_read_once_a_task(built, tmp_path, monkeypatch):
    path, _ = built
    plan, tasks = planned(path)
    opened: Counter[str] = Counter()
    read = pack.read_table

    def counted(store, name, *columns):
        opened[name] += 1
        return read(store, name, *columns)

    monkeypatch.setattr(pack, "read_table", counted)
    for task in tasks:
        opened.clear()
        pack.write_shards(Store(str(tmp_path / "out")), plan, task)
        assert {part for rows in task.shards for part, _ in rows.tolist()} == set(range(len(task.parts)))
        assert len(opened) == 2 * len(task.parts)
        assert set(opened.values()) == {1}


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_completion_does_not_show(built, tmp_path, monkeypatch, seed):
    """Every read and every write takes a time of its own, and the tasks come in another order."""
    path, manifest = built
    plan, tasks = planned(path)
    chance = random.Random(seed)
    guard = threading.Lock()

    def slowly(step):
        def call(*given, **named):
            with guard:
                pause = chance.uniform(0, 0.02)
            time.sleep(pause)
            return step(*given, **named)

        return call

    monkeypatch.setattr(pack, "read_unit", slowly(pack.read_unit))
    monkeypatch.setattr(pack, "_shard", slowly(pack._shard))
    order = chance.sample(range(len(tasks)), len(tasks))
    found = written_again(path, tmp_path / "again", plan, tasks, order)
    assert [found[name] for name in sorted(found)] == shard_hashes(manifest)


def test_shards_are_written_side_by_side(built, tmp_path, monkeypatch):
    """The two shards of a task wait for each other; one after the other they never would end."""
    path, _ = built
    plan, tasks = planned(path)
    meeting = threading.Barrier(len(tasks[0].shards), timeout=60)
    shard = pack._shard
    monkeypatch.setattr(pack, "_shard", lambda *given: (meeting.wait(), shard(*given))[1])
    assert len(written_again(path, tmp_path / "again", plan, tasks[:1])) == 2


def test_a_fault_between_two_shards_leaves_whole_ones_and_the_rest_is_made(built, tmp_path, monkeypatch):
    path, manifest = built
    plan, tasks = planned(path)
    folder = tmp_path / "again"
    put_new = Store.put_new
    left = [3]

    def faulty(self, name, *pieces):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the store is gone")
        return put_new(self, name, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_new", faulty)
        with pytest.raises(OSError, match="the store is gone"):
            written_again(path, folder, plan, tasks)
    there = {p.name: p.read_bytes() for p in folder.glob("builds/*/shards/*")}
    assert len(there) == 3
    for name in ("parts", "scores"):
        (folder / name).unlink()
    found = written_again(path, folder, plan, tasks)
    assert [found[name] for name in sorted(found)] == shard_hashes(manifest)
    after = {p.name: p.read_bytes() for p in folder.glob("builds/*/shards/*")}
    assert there.items() <= after.items()


def test_images_lie_in_a_part_as_they_are(built, tmp_path):
    """A reader gets them without decompressing; the other columns are small."""
    (part, *_) = sorted((tmp_path / "out").glob("parts/*/*.parquet"))
    group = pq.ParquetFile(part).metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    image = columns.pop("image")
    assert image.compression == "UNCOMPRESSED"
    assert not any("DICTIONARY" in encoding for encoding in image.encodings)
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    stored = part.read_bytes()
    for data in pq.read_table(part, columns=["image"]).column("image").to_pylist():
        assert data in stored
