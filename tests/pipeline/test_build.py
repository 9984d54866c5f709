"""Builds on the local runner: what is generated, what is kept, and that every way gives the same dataset."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from jobs.build import make_runner
from pipeline.build import Result, build, repack
from pipeline.config import load
from pipeline.ledger import history, named
from pipeline.store import Store
from schemas.errors import Interrupted, UserError
from tests.small_build import (
    CLASSES,
    Sketch,
    listing,
    make_config,
    parts_of,
    seeds_recipe,
    shard_hashes,
    sketch_recipe,
)

HASH, OTHER = "tests.small_build:HashFilter", "tests.small_build:OtherHashFilter"
SKETCH = {"plain": sketch_recipe()}


@pytest.fixture(autouse=True)
def one_backbone(monkeypatch, tangram):
    """Loading it takes longer than most of these builds."""
    monkeypatch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)


class Silent:
    """Telemetry that nobody watches."""

    def __getattr__(self, name):
        return lambda *arguments, **facts: None


def run(path: Path, *overrides: str) -> Result:
    return build(load(path, overrides), Silent(), make_runner)


def packed(path: Path, *overrides: str) -> Any:
    return repack(load(path, overrides), Silent())


def config(folder: Path, references: Path | None = None, **changes: Any) -> Path:
    return make_config(folder, references, **{"recipes": SKETCH, **changes})


def fresh(tmp_path: Path, path: Path, *overrides: str) -> tuple[Result, set[str]]:
    """The same config into an output of its own; the result and its parts."""
    output = tmp_path / f"fresh-{uuid.uuid4().hex}"
    return run(path, *overrides, f"output={output}"), parts_of(output)


def accounts(result: Result) -> dict[str, Any]:
    return {
        f"{label} / {name}": account
        for label, target in result.manifest.targets.items()
        for name, account in target.recipes.items()
    }


def rows(output: Path, kind: str = "parts") -> list[dict[str, Any]]:
    return [
        row for path in sorted(output.glob(f"{kind}/**/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


# --- one build --------------------------------------------------------------------------------------------


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


# --- a changed config -------------------------------------------------------------------------------------


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


# --- references -------------------------------------------------------------------------------------------


@pytest.fixture
def seeded(tmp_path, references):
    seeds = seeds_recipe(batch=4, generate="tests.small_build:Sketch")
    return config(tmp_path, references, recipes={"seeds": seeds}, targets=[{"classes": "all", "accepted": 4}])


def test_a_new_reference_makes_its_class_anew_and_no_other(tmp_path, references, seeded):
    first = run(seeded)
    before = listing(tmp_path / "out")
    streams = {row["stream"]: row["class"] for row in rows(tmp_path / "out", "builds")}
    shutil.copy(references / "ring" / "0000.png", references / "gear" / "new.png")
    second = run(seeded)
    assert second.made
    after = listing(tmp_path / "out")
    assert {name: after[name] for name in before if name != "latest.json"} == {
        name: facts for name, facts in before.items() if name != "latest.json"
    }
    new = {name.split("/")[1] for name in after.keys() - before.keys() if name.startswith("parts/")}
    now = {row["stream"]: row["class"] for row in rows(tmp_path / "out", "builds")}
    assert {now[stream] for stream in new} == {"gear"}
    assert not new & streams.keys()
    assert len([n for n in after.keys() - before.keys() if n.startswith("seeds/")]) == 1
    assert second.manifest == fresh(tmp_path, seeded)[0].manifest

    kept = run(seeded, f"references.lock={first.manifest.build_id}")
    assert kept.manifest == first.manifest
    assert not kept.made


def test_a_lock_needs_the_source_no_more(tmp_path, references, seeded):
    first = run(seeded)
    wanted = fresh(tmp_path, seeded, "targets.0.accepted=9")[0].manifest
    shutil.rmtree(references)
    more = run(seeded, f"references.lock={first.manifest.build_id}", "targets.0.accepted=9")
    assert more.manifest == wanted
    with pytest.raises(UserError, match="does not exist"):
        run(seeded)


def test_where_the_references_lie_changes_nothing(tmp_path, references, seeded):
    first = run(seeded)
    moved = references.rename(tmp_path / "moved")
    assert run(seeded, f"references.uri={moved}").manifest == first.manifest


def test_a_kept_reference_that_is_damaged_is_not_used(tmp_path, seeded):
    run(seeded)
    for name in ("builds", "seeds", "parts", "scores"):
        shutil.rmtree(tmp_path / "out" / name)
    victim = next((tmp_path / "out").glob("references/*/*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=victim.name):
        run(seeded)


def test_photographs_far_from_the_models_world(tmp_path, photographs, bad_files, seedloom):
    folder = tmp_path / "photographs"
    usable = [p for p in photographs.values() if p.suffix != ".tif"]  # one has planes that Pillow cannot read
    small = sorted(usable, key=lambda p: (p.stat().st_size, p.name))
    different = list({p.read_bytes(): p for p in small[:12]}.values())[:8]
    for number, photograph in enumerate(different):
        (folder / ("odd", "even")[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(photograph, folder / ("odd", "even")[number % 2])
    for name, (content, _) in bad_files.items():
        (folder / "odd" / f"bad_{name}").write_bytes(content)
    result = run(
        make_config(
            tmp_path, folder, recipes={"seeds": seeds_recipe(batch=4)}, filter=["clip"],
            targets=[{"classes": "all", "accepted": 4, "attempts": 1}],
        )
    )  # fmt: skip
    odd, even = result.manifest.targets["odd"], result.manifest.targets["even"]
    assert (odd.admitted, odd.quarantined) == (4, len(bad_files))
    assert (even.admitted, even.quarantined) == (4, 0)
    assert sum(a.failed for a in accounts(result).values()) == 0
    assert seedloom("verify", tmp_path / "out", "--deep").code == 0


# --- trouble ----------------------------------------------------------------------------------------------


@pytest.fixture
def trouble(monkeypatch):
    """Let the first calls of `Sketch` raise: `trouble(error, …)`; returns the list that is worked off."""
    draw = Sketch.__call__

    def start(*errors: BaseException | None) -> list[BaseException | None]:
        waiting = list(errors)

        def call(self, backbone, z_BCHW, prompt):
            if waiting and (error := waiting.pop(0)):
                raise error
            return draw(self, backbone, z_BCHW, prompt)

        monkeypatch.setattr(Sketch, "__call__", call)
        return waiting

    return start


ONE = {"targets": [{"classes": ["circle"], "accepted": 6}]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_that_does_not_come_again_is_no_failure(tmp_path, trouble, count):
    """One fails a batch, two a batch and a candidate alone, three two candidates alone."""
    path = config(tmp_path, **ONE)
    other = fresh(tmp_path, path)[0].manifest
    waiting = trouble(*[RuntimeError("a hiccup")] * count)
    assert run(path).manifest == other
    assert waiting == []


def test_an_error_that_comes_twice_is_a_failure(tmp_path, trouble):
    hiccup = RuntimeError("no good\nsecond line")
    # the batch of candidates 0 and 1, then 0 alone; the batch of 2 and 3; then the whole again
    trouble(hiccup, hiccup, None, None, hiccup, hiccup)
    result = run(config(tmp_path, **ONE))
    (account,) = accounts(result).values()
    assert account.failed == 1
    first = rows(tmp_path / "out")
    assert [row["error"] for row in first if row["error"]] == ["RuntimeError: no good"]


def test_errors_that_are_never_the_same_end_the_build(tmp_path, trouble):
    waiting = trouble(*[RuntimeError(str(n)) for n in range(200)])
    with pytest.raises(RuntimeError, match=r"circle / plain raises another error each time"):
        run(config(tmp_path, **ONE))
    assert waiting


def test_where_every_candidate_fails_nothing_is_committed(tmp_path):
    poisoned = {"method": "tests.small_build:Poisoned", "share": 1}
    path = config(tmp_path, recipes={"plain": sketch_recipe(generate=poisoned)}, **ONE)
    with pytest.raises(RuntimeError, match=r"every candidate of circle / plain failed: ValueError: poison"):
        run(path)
    assert parts_of(tmp_path / "out") == set()
    assert not list((tmp_path / "out").glob("builds/*/manifest.json"))


@pytest.mark.parametrize("picture", [float("nan"), 0.3])
def test_an_image_that_shows_nothing_is_a_failure(tmp_path, monkeypatch, picture):
    draw = Sketch.__call__

    def call(self, backbone, z_BCHW, prompt):
        image_B3hw = draw(self, backbone, z_BCHW, prompt)
        return torch.where((z_BCHW[:, 0, 0, 0] > 0)[:, None, None, None], image_B3hw, picture)

    monkeypatch.setattr(Sketch, "__call__", call)
    result = run(config(tmp_path, **ONE))
    (account,) = accounts(result).values()
    assert account.failed > 0
    wanted = "the image is not finite" if picture != 0.3 else "the image is flat"
    assert all(wanted in row["error"] for row in rows(tmp_path / "out") if row["status"] == "failed")


def test_out_of_memory_names_the_batch_to_set(tmp_path, trouble):
    trouble(*[torch.cuda.OutOfMemoryError("no more")] * 9)
    with pytest.raises(UserError, match=r"out of memory at batch 2; set recipes\.plain\.batch=1"):
        run(config(tmp_path, **ONE))


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_ctrl_c_says_how_to_go_on_and_loses_nothing(tmp_path, trouble, calls):
    path = config(tmp_path)
    other = fresh(tmp_path, path)[0].manifest
    trouble(*[None] * calls, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="Run the same command again to go on"):
        run(path)
    parts = parts_of(tmp_path / "out")
    result = run(path)
    assert result.manifest == other
    assert parts <= parts_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["parts", "scores"])
def test_a_damaged_part_is_named_in_one_line(tmp_path, seedloom, kind):
    path = config(tmp_path)
    run(path)
    table = pq.read_table(
        next((tmp_path / "out" / "builds").rglob("000000.parquet")), columns=["stream", "unit"]
    )
    sample = table.to_pylist()[0]  # of a part that packing reads
    shutil.rmtree(tmp_path / "out" / "builds")
    victim = next((tmp_path / "out" / kind / sample["stream"]).rglob(f"{sample['unit']:06d}.parquet"))
    data = victim.read_bytes()
    middle = len(data) // 2
    victim.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    for command in ("build", "pack"):
        ended = seedloom(command, path)
        assert ended.code == 4
        assert f"{victim}: damaged" in ended.err.splitlines()[-1]
        assert ended.err.endswith("remove it and build again\n")
    assert not list((tmp_path / "out").glob("builds/*/manifest.json"))
    victim.unlink()
    assert run(path).manifest == fresh(tmp_path, path)[0].manifest
