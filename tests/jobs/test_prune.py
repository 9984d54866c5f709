"""`seedloom prune`: what no kept build is made from goes, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline import prune as pruning
from pipeline.lease import Lease
from pipeline.store import Store
from tests.local_build import HASH, config, packed, run
from tests.small_build import listing, seeds_recipe, shard_hashes

pytestmark = pytest.mark.usefixtures("one_backbone")

DAY = 24 * 3600


def age(output: Path, days: float = 2) -> None:
    """Let everything be written so many days ago."""
    for path in output.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def three(tmp_path, references):
    """Three builds that share some parts: of two classes, of three, and of three with another rng_seed."""
    recipes = {"mixed": seeds_recipe()}
    made = []
    for classes, seed in ((["circle"], 1), (["circle", "gear"], 1), (["gear"], 2)):
        targets = [{"classes": classes, "accepted": 4}]
        path = config(tmp_path, references, recipes=recipes, targets=targets, rng_seed=seed)
        made.append((path.read_text(), run(path)))
    return tmp_path / "out", made


def names(output: Path) -> set[str]:
    return {name for name in listing(output) if not name.startswith("leases/")}


def test_a_kept_build_stays_whole_and_what_is_only_of_others_goes(three, seedloom, tmp_path):
    output, made = three
    age(output)
    before = names(output)
    ended = seedloom("prune", output, "--keep", 1)
    assert ended.code == 0
    gone = before - names(output)
    last = made[-1][1].manifest
    assert {name.split("/")[1] for name in names(output) if name.startswith("builds/")} == {last.build_id}
    needed = {folder for t in last.targets.values() for r in t.recipes.values() for folder in r.objects}
    for name in names(output):
        kind = name.split("/")[0]
        if kind in ("parts", "scores", "seeds", "artifacts"):
            assert any(name.startswith(f"{folder}/") for folder in needed), name
    assert {name.split("/")[0] for name in gone} == {"builds", "parts", "scores", "seeds"}
    assert seedloom("verify", "--deep", output).code == 0
    empty = [p.name for p in output.rglob("*") if p.is_dir() and not any(p.iterdir())]
    assert empty in ([], [".tmp"])


def test_what_two_builds_share_stays_while_one_of_them_is_kept(three, seedloom):
    output, made = three
    age(output)
    assert seedloom("prune", output, "--keep", 2).code == 0
    (_, first), (text, second), _ = made
    shared = set(first.manifest.targets["circle"].recipes["mixed"].objects)
    assert shared == set(second.manifest.targets["circle"].recipes["mixed"].objects)
    assert all((output / folder).is_dir() for folder in shared)
    # the second is packed again from what is there, and makes nothing
    folder = output / "builds" / second.manifest.build_id
    shutil.rmtree(folder)
    path = output.parent / "dataset.yaml"
    path.write_text(text)
    assert shard_hashes(packed(path).manifest) == shard_hashes(second.manifest)


def test_all_complete_builds_are_kept_unless_told_and_an_old_unfinished_one_is_not(three, seedloom):
    output, made = three
    unfinished = output / "builds" / made[0][1].manifest.build_id
    (unfinished / "manifest.json").unlink()
    age(output)
    before = names(output)
    assert seedloom("prune", output).code == 0
    assert not unfinished.exists()
    only = set(made[1][1].manifest.targets["circle"].recipes["mixed"].objects)
    assert all((output / folder).is_dir() for folder in only)  # the second build needs them as well
    gone = before - names(output)
    assert {name.split("/")[0] for name in gone} == {"builds"}


def test_what_is_younger_than_a_day_stays(three, seedloom):
    output, _ = three
    before = listing(output)
    ended = seedloom("prune", output, "--keep", 1)
    assert ended.code == 0
    assert "3 builds kept" in ended.out
    after = {name: facts for name, facts in listing(output).items() if not name.startswith("leases/prune")}
    assert after == before
    age(output)
    orphan = output / "parts" / ("0" * 20) / "000000.parquet"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"just begun")
    assert "1 younger than a day stay" in seedloom("prune", output, "--keep", 1).out
    assert orphan.exists()


def test_a_dry_run_says_what_would_go_and_removes_nothing(three, seedloom):
    output, _ = three
    age(output)
    before = listing(output)
    facts = json.loads(seedloom("prune", output, "--keep", 1, "--dry-run", "--json").out)
    assert listing(output) == before
    done = json.loads(seedloom("prune", output, "--keep", 1, "--json").out)
    assert {**done, "dry_run": True} == facts
    lost = {name: size for name, (size, _) in before.items() if name not in listing(output)}
    assert facts["bytes"] == sum(lost.values())
    assert sum(facts["objects"].values()) == len(lost)
    assert facts["removed"] == [entry[1].manifest.build_id for entry in (three[1][1], three[1][0])]


def test_a_prune_that_is_stopped_leaves_no_build_that_looks_complete_and_the_next_ends_it(
    three, seedloom, monkeypatch
):
    output, _ = three
    age(output)
    remove, left = Store.remove, [3]

    def stopping(self, name):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the machine is gone")
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", stopping)
        with pytest.raises(OSError, match="the machine is gone"):
            pruning.prune(Store(str(output)), 1, 10)
    assert len(list(output.glob("builds/*/manifest.json"))) == 1
    assert len(list(output.glob("builds/*/shards"))) == 3
    assert seedloom("prune", output, "--keep", 1).code == 0
    assert len(list(output.glob("builds/*"))) == 1
    assert seedloom("verify", output).code == 0


def test_while_a_build_is_at_work_nothing_is_removed(three, seedloom, monkeypatch):
    output, made = three
    age(output)
    before = names(output)
    monkeypatch.setattr("pipeline.lease._machine", lambda: None)
    with Lease(Store(str(output)), f"build-{made[0][1].manifest.build_id}", 0.1):
        ended = seedloom("prune", output, "--keep", 1)
    assert ended.code == 5
    assert f"build {made[0][1].manifest.build_id} is at work already" in ended.err
    assert names(output) == before


def test_the_history_keeps_its_numbers(three, seedloom):
    output, _ = three
    age(output)
    assert seedloom("prune", output, "--keep", 1).code == 0
    assert len(list(output.glob("history/*.json"))) == 3
    said = seedloom("status", output).out
    assert said.count("pruned") == 2
    path = output.parent / "dataset.yaml"
    again = run(path, "rng_seed=9")
    assert json.loads((output / "latest.json").read_text())["number"] == 4
    assert again.made


def test_a_memory_store_is_pruned_too(tmp_path, monkeypatch):
    output = f"memory://{tmp_path.name}"
    path = config(tmp_path, output=output, filter=[HASH])
    run(path)
    run(path, "rng_seed=5")
    monkeypatch.setattr(pruning, "SPARED", -1)
    store = Store(output)
    found = pruning.prune(store, 1, 10)
    assert len(found.removed) == 1
    assert not list(store.walk(f"builds/{found.removed[0]}"))
    assert pruning.prunable(store, 1).objects == ()


def test_an_output_that_is_not_there_has_nothing_to_prune(tmp_path, seedloom):
    ended = seedloom("prune", tmp_path / "nowhere", "--dry-run")
    assert ended.code == 0
    assert "0 builds kept" in ended.out
    assert not (tmp_path / "nowhere").exists()
