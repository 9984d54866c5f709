"""References and a build: what a new, moved, missing or damaged one changes."""

from __future__ import annotations

import shutil

import pytest

from schemas.errors import UserError
from tests.local_build import accounts, config, fresh, rows, run
from tests.small_build import listing, make_config, seeds_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


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
