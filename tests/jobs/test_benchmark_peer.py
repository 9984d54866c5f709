"""The benchmark beside Ray Data: what it counts on disk and in memory, and both sides killed in miniature."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks import peer as benchmark
from jobs.benchmarks.peer import CHECKPOINTED, CLASSES, OURS, THEIRS, Job


def shard(path, *keys, share=1.0):
    """A tar of a picture, or a share of its bytes, and a class for each key; gives where the first lies."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(picture, "jpeg")
    data = picture.getvalue()[: int(share * picture.tell())]
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for extension, content in (("cls", b"0"), ("jpg", data)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        return next(m.offset_data for m in tar if m.name.endswith("jpg"))


def test_samples_are_counted_by_key_and_damage_by_shard(tmp_path):
    paths = [tmp_path / f"{n}.tar" for n in range(4)]
    shard(paths[0], "a", "b")
    shard(paths[1], "b", "c")  # b is there twice
    middle = shard(paths[2], "d", "e")
    with paths[2].open("r+b") as file:  # as a killed writer leaves it: in the middle of a picture
        file.truncate(middle + 100)
    shard(paths[3], "g", share=0.5)  # a whole tar of half a picture
    found, damaged = benchmark.audit(paths)
    assert found == {"a": 1, "b": 2, "c": 1}
    assert damaged == 2


def test_a_tar_without_its_end_is_damaged_though_all_samples_are_there(tmp_path):
    path = tmp_path / "0.tar"
    shard(path, "a")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    os.truncate(path, last.offset_data + -(-last.size // 512) * 512)
    assert benchmark.audit([path]) == ({"a": 1}, 1)


def test_a_batch_still_being_written_is_not_made(tmp_path):
    log = tmp_path / "made.jsonl"
    assert benchmark._read(log) == []
    log.write_text('[1.5, ["a", "b"]]\n[2.5, ["c"')
    assert benchmark._read(log) == [(1.5, ["a", "b"])]


def test_memory_is_of_a_process_and_all_that_it_started():
    grandchild = "import sys, numpy; x = numpy.ones(40_000_000); print('up', flush=True); sys.stdin.read()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        family = benchmark.tree(process.pid)
        assert len(family) == 2
        assert process.pid in family
        assert os.getpid() not in family
        assert 320e6 < sum(map(benchmark._pss, family)) < 640e6
        process.stdin.close()
    assert benchmark.tree(process.pid) == set()
    assert benchmark._pss(process.pid) == 0


def test_both_sides_are_asked_for_the_same():
    job = Job(per_class=16, steps=4, batch=4, shard=16, workers=2, gpus=0)
    rows = benchmark._rows(job)
    assert len(rows) == job.images == len({r["__key__"] for r in rows}) == len({r["seed"] for r in rows})
    assert {r["txt"] for r in rows} == {f"a photo of a {label}" for label in CLASSES}


def test_batches_that_cannot_be_full_are_refused(tmp_path):
    app = Typer()
    app.command()(benchmark.peer)
    done = CliRunner().invoke(app, ["--per-class", "20", "--batch", "16", "--out", str(tmp_path / "x.json")])
    assert "--per-class 20: must be a multiple of --batch (16)" in str(done.exception)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_side_is_timed_killed_and_counted(tmp_path):
    app = Typer()
    app.command()(benchmark.peer)
    out = tmp_path / "new" / "peer.json"
    done = CliRunner().invoke(app, ["--quick", "--workers", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads(out.read_text())
    clean = {"duplicates": 0, "missing": 0, "unreadable_shards": 0, "images_made_again": 0}
    assert set(facts["timed"]) == {THEIRS, OURS}
    for name in (THEIRS, OURS):
        (run,) = facts["timed"][name]
        assert clean.items() <= run.items()
        assert run["samples"] == run["images_made"] == facts["images"] == 64
        assert run["images_per_second"] == pytest.approx(64 / run["seconds"], rel=0.01)
        assert run["first_image_seconds"] < run["first_shard_seconds"] <= run["seconds"]
        assert run["idle_cluster_gb"] < run["peak_gb"]
    assert set(facts["killed"]) == {THEIRS, CHECKPOINTED, OURS}
    for name, (run,) in facts["killed"].items():
        assert run["made_before_the_kill"] >= 32
        assert run["missing"] == 0, name
        assert run["shards"] >= 4, name  # a side that is given all as one block could save nothing
        assert run["images_made"] - run["images_made_again"] == 64
    (ours,) = facts["killed"][OURS]
    assert {k: v for k, v in clean.items() if k != "images_made_again"}.items() <= ours.items()
    assert ours["samples"] == 64
    # at the most what was being made or committed when it was killed
    assert ours["images_made_again"] <= 2 * 2 * facts["batch"]
    (theirs,) = facts["killed"][THEIRS]
    assert theirs["images_made_again"] >= 32  # without checkpoints it begins anew
    assert facts["hardware"] in done.output
