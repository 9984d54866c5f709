"""One build on the local runner: what is generated, what is kept, and what a row says of itself."""

from __future__ import annotations

import json
import uuid

import numpy as np
import pyarrow.parquet as pq
import pytest

from schemas.ids import random_stream, sha256
from stages.contract import Chance
from tests.local_build import HASH, accounts, config, fresh, rows, run
from tests.small_build import Shaken, make_config, seeds_recipe, shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


def test_every_outcome_occurs_and_the_sums_close(tmp_path, references, seedloom):
    (references / "gear" / "broken.png").write_bytes(b"no image")
    poisoned = {"method": "tests.small_build:Poisoned", "share": 0.15}
    path = config(
        tmp_path,
        references,
        recipes={"noise": sketch_recipe(generate=poisoned), "seeds": seeds_recipe(batch=4)},
        targets=[
            {"classes": ["circle", "gear"], "accepted": 9, "recipe": {"noise": 2, "seeds": 1}},
            {"classes": ["ring"], "accepted": 5, "attempts": 2, "recipe": "noise",
             "filter": [{"method": HASH, "least": 0.9}]},
        ],
    )  # fmt: skip
    result = run(path)
    found = accounts(result)
    for account in found.values():
        rejected = sum(account.rejected.values())
        assert account.candidates == account.accepted + rejected + account.surplus + account.failed
        assert account.quota == account.accepted + account.missing
    assert sum(sum(a.rejected.values()) for a in found.values()) > 0
    assert sum(a.failed for a in found.values()) > 0
    assert sum(a.surplus for a in found.values()) > 0
    assert found["ring / noise"].exhausted
    assert found["ring / noise"].candidates == 12  # 5 × 2, in whole units
    assert {name: a.quota for name, a in found.items()} == {
        "circle / noise": 6, "circle / seeds": 3, "gear / noise": 6, "gear / seeds": 3, "ring / noise": 5,
    }  # fmt: skip
    assert result.manifest.shortfall == found["ring / noise"].missing > 0
    assert result.manifest.targets["gear"].admitted == 4
    assert result.manifest.targets["gear"].quarantined == 1
    assert result.manifest.quarantined == {"gear": 1}
    assert result.manifest.samples == sum(a.accepted for a in found.values())

    failed = [row for row in rows(tmp_path / "out") if row["status"] == "failed"]
    assert {row["error"] for row in failed} == {"ValueError: poison"}
    assert all(row["image"] is None for row in failed)

    assert seedloom("verify", tmp_path / "out", "--deep").code == 0
    again = seedloom("build", path)
    assert again.code == 3  # complete, with shortfall
    assert "attempts used up" in again.out
    assert "nothing to do" in again.out


def test_a_failed_candidate_leaves_its_neighbours_as_they_are(tmp_path):
    poisoned = {"method": "tests.small_build:Poisoned", "share": 0.25}
    run(config(tmp_path / "a", filter=[], recipes={"plain": sketch_recipe(generate=poisoned)}))
    run(config(tmp_path / "b", filter=[]))
    images = {row["key"].rpartition("-")[0]: row["image_sha256"] for row in rows(tmp_path / "b/out")}
    some, failed = rows(tmp_path / "a/out"), 0
    for row in some:
        failed += row["status"] == "failed"
        if row["status"] == "ok":
            assert images.get(row["key"].rpartition("-")[0], row["image_sha256"]) == row["image_sha256"]
    assert 0 < failed < len(some)


def test_a_refinement_gets_the_chance_of_each_candidate_in_its_own_stage(tmp_path):
    """So its randomness is neither that of the seed nor that of generating, and no batch changes it."""
    refined = sketch_recipe(refine="tests.small_build:Shaken", batch=4)
    targets = [{"classes": ["circle"], "accepted": 4}]
    run(config(tmp_path, recipes={"plain": refined}, targets=targets, filter=[]))
    made = {row["index"]: row for row in rows(tmp_path / "out")}
    for index in range(4):
        seed = random_stream(1, "noise", "circle", "plain", index).standard_normal((4, 16, 16), np.float32)
        shaken = seed + Shaken.noise(Chance(index, (1, "refine", "circle", "plain")), seed.shape).numpy()
        assert made[index]["seed_sha256"] == sha256(shaken.tobytes())
        assert made[index]["refine_losses"] == [index] * index  # rows may have run for different times


def test_a_plan_asks_the_refinement_about_each_class(tmp_path, seedloom):
    path = config(tmp_path, recipes={"plain": sketch_recipe(refine="tests.small_build:Shaken")})
    ended = seedloom("plan", path)
    assert (ended.code, ended.out) == (2, "")
    assert "gears are not to be shaken" in ended.err


def test_a_row_of_a_shard_says_how_it_came_to_be(tmp_path, references):
    result = run(make_config(tmp_path, references))
    hashes = {p.parent.name: set() for p in references.glob("*/*")}
    lock = json.loads(next((tmp_path / "out").glob("builds/*/references.lock")).read_text())
    for label, admitted in lock["classes"].items():
        hashes[label] = {reference["sha256"] for reference in admitted}
    samples = rows(tmp_path / "out", "builds")
    assert len(samples) == result.manifest.samples == 18
    for row in samples:
        assert set(row["parents"]) <= hashes[row["class"]]
        assert len(row["parents"]) == len(row["weights"]) == 2
        assert row["tests_small_build_HashFilter_fraction"] >= 0.5
        assert row["prompt"] == f"a photo of a {row['class']}"
        assert 0.5 < row["seed_norm"] < 2
    assert len({row["key"] for row in samples}) == 18


def test_samples_are_mixed_over_shards_of_equal_size(tmp_path):
    result = run(config(tmp_path))
    assert [shard.rows for shard in result.manifest.shards] == [4, 4, 4, 4, 2]
    assert [shard.name for shard in result.manifest.shards] == [f"{n:06d}" for n in range(5)]
    first = pq.read_table(next((tmp_path / "out").glob("builds/*/shards/000000.parquet"))).to_pylist()
    assert len({row["class"] for row in first}) > 1 or len({row["unit"] for row in first}) > 1


def test_names_of_any_length_and_script(tmp_path, seedloom):
    names = ["w" * 90, "Bär/../x", "星", "a b.c"]
    path = config(
        tmp_path,
        recipes={"r" * 90: sketch_recipe()},
        targets=[{"classes": names, "accepted": 1, "attempts": 1}],
        filter=[],
        prompt="{class}",
    )
    assert run(path).manifest.samples == 4
    assert seedloom("verify", tmp_path / "out").code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"dataset.yaml", "out"}
    assert {row["class"] for row in rows(tmp_path / "out", "builds")} == set(names)


def test_an_output_in_memory(tmp_path, seedloom):
    uri = f"memory://{uuid.uuid4().hex}/out"
    path = config(tmp_path, output=uri)
    assert shard_hashes(run(path).manifest) == shard_hashes(fresh(tmp_path, path)[0].manifest)
    assert seedloom("verify", uri, "--deep").code == 0
    assert not run(path).made
