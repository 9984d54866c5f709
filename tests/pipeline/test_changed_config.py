"""Another config in the same output makes only what is missing, and the same dataset as a fresh build."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.ledger import history, named
from pipeline.store import Store
from tests.local_build import HASH, OTHER, accounts, config, fresh, packed, rows, run
from tests.small_build import CLASSES, listing, parts_of, shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


def test_an_unchanged_config_does_nothing_and_says_so(tmp_path, references, seedloom):
    path = config(tmp_path, references)
    first = run(path)
    before = listing(tmp_path)
    again = run(path, "run.workers=2")
    assert not again.made
    assert again.manifest == first.manifest
    assert "nothing to do, it is complete" in seedloom("build", path).out
    assert "nothing to do, it is complete" in seedloom("pack", path).out
    assert listing(tmp_path) == before


@pytest.mark.parametrize("least", [0.2, 0.8])
def test_a_changed_threshold(tmp_path, least, seedloom):
    path, changed = config(tmp_path), f"filter.0.least={least}"
    run(path)
    before, parts = listing(tmp_path), parts_of(tmp_path / "out")
    other, other_parts = fresh(tmp_path, path, changed)
    if least < 0.5:  # loosened: enough is there
        result = packed(path, changed)
        assert result.made
        assert parts_of(tmp_path / "out") == parts
    else:
        short = packed(path, changed)
        assert set(short) == set(CLASSES)
        told = seedloom("pack", path, "--set", changed)
        assert told.code == 3
        assert f"circle: short by {short['circle']}" in told.out
        asked = json.loads(seedloom("pack", path, "--set", changed, "--json").out)
        assert asked == {"event": "short", "missing": short}
        assert listing(tmp_path / "out") == {
            name.removeprefix("out/"): facts for name, facts in before.items() if name.startswith("out/")
        }
        result = run(path, changed)
        assert parts_of(tmp_path / "out") == parts | other_parts
        assert result.units == len(other_parts - parts) > 0
    assert shard_hashes(result.manifest) == shard_hashes(other.manifest)
    assert result.manifest == other.manifest


def test_short_is_what_is_certainly_missing(tmp_path):
    """A unit that is lost is counted, even where later ones could fill the quota."""
    path = config(tmp_path, filter=[], targets=[{"classes": ["circle"], "accepted": 8}])
    run(path)
    for part in (tmp_path / "out").glob("parts/*/000000.parquet"):
        part.unlink()
    shutil.rmtree(tmp_path / "out" / "builds")
    assert packed(path) == {"circle": 8}
    assert run(path).units == 1


def test_a_filter_that_is_added_later_only_scores(tmp_path):
    path = config(tmp_path)
    run(path)
    before = {name: facts for name, facts in listing(tmp_path / "out").items() if name[0] in "ps"}
    added = f"filter=[{{method: '{HASH}', least: 0.5}}, {{method: '{OTHER}', least: 0}}]"
    assert set(packed(path, added)) == set(CLASSES)  # nothing is scored yet, so nothing is certain
    result = run(path, added)
    assert result.units == 0
    after = listing(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert shard_hashes(result.manifest) == shard_hashes(fresh(tmp_path, path, added)[0].manifest)

    stricter = added.replace("least: 0}", "least: 0.6}")
    result = run(path, stricter)
    other, parts = fresh(tmp_path, path, stricter)
    assert result.units == len(parts) - len([name for name in before if name.startswith("parts/")])
    assert result.manifest == other.manifest


@pytest.mark.parametrize("quota", [3, 13])
def test_a_changed_quota(tmp_path, quota):
    path, changed = config(tmp_path), f"targets.0.accepted={quota}"
    run(path)
    parts = parts_of(tmp_path / "out")
    result = run(path, changed)
    other, other_parts = fresh(tmp_path, path, changed)
    assert result.manifest == other.manifest
    assert result.units == len(other_parts - parts)
    assert (result.units > 0) == (quota > 6)
    assert parts_of(tmp_path / "out") == parts | other_parts


def test_what_parts_do_not_depend_on_makes_none(tmp_path):
    path = config(tmp_path, filter=[])
    run(path)
    parts = parts_of(tmp_path / "out")
    for change in ("shard.samples=5", "shard.window=1", "name=other", "targets.0.attempts=3"):
        result = run(path, change)
        assert result.made
        assert result.units == 0
    assert parts_of(tmp_path / "out") == parts
    for change in ("rng_seed=2", "shard.quality=80", "prompt=one {class}", "recipes.plain.unit=8"):
        assert run(path, change).units > 0


def test_history_is_the_order_of_completion(tmp_path):
    path = config(tmp_path, filter=[])
    first, second = run(path), run(path, "targets.0.accepted=2")
    assert run(path).made is False  # and it is the newest again
    store = Store(str(tmp_path / "out"))
    ids = [entry["build_id"] for entry in history(store)]
    assert ids == [first.manifest.build_id, second.manifest.build_id, first.manifest.build_id]
    assert named(store) == first.manifest
    assert json.loads(store.get("latest.json"))["build_id"] == first.manifest.build_id
    (tmp_path / "out/history/1.json").unlink()
    run(path, "targets.0.accepted=4")
    assert [entry["number"] for entry in history(store)] == [2, 3, 4]


def test_shares_hold_among_the_accepted_and_nobody_fills_in(tmp_path):
    recipes = {"a": sketch_recipe(), "b": sketch_recipe(filter=[{"method": HASH, "least": 1}])}
    path = config(
        tmp_path,
        recipes=recipes,
        targets=[{"classes": ["circle"], "accepted": 8, "attempts": 4, "recipe": {"a": 3, "b": 1}}],
        filter=[],
    )
    found = accounts(run(path))
    assert (found["circle / a"].accepted, found["circle / a"].missing) == (6, 0)
    assert (found["circle / b"].accepted, found["circle / b"].missing) == (0, 2)
    assert found["circle / b"].exhausted
    assert found["circle / b"].candidates == 8
    images = {row["image_sha256"] for row in rows(tmp_path / "out")}
    assert len(images) == len(rows(tmp_path / "out"))  # two recipes do not draw the same noise
