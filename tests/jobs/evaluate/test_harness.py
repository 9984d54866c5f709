"""Arms are ordinary builds: shared seeds, paired draws, nothing made twice; and tables tell what failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.evaluate.harness import (
    Arm,
    Features,
    Real,
    Seen,
    Table,
    View,
    drawings,
    drawn_like,
    look,
    make,
    milliseconds,
    read,
    tabulate,
)
from jobs.evaluate.metrics import Observers
from jobs.tangram.drawings import CLASSES, SPLITS, draw, generator
from pipeline.store import Store
from schemas.errors import Damaged, UserError
from stages import images
from tests.small_build import drawings as references  # noqa: F401  fixture
from tests.small_build import listing, sketch_recipe

RUN = {"runner": "local"}
PAIRS = 2
FOLDERS = ("seeds", "artifacts", "parts", "scores", "builds")


def arm(name, folder, combine, **changes):
    recipe = sketch_recipe(**changes)
    if combine:
        recipe |= {"invert": {"method": "ddim", "steps": 2}, "combine": combine}
    config = {
        "references": {"uri": str(folder)},
        "recipes": {"pair": recipe},
        "targets": [{"classes": ["circle", "gear"], "accepted": 3 * PAIRS, "attempts": 1}],
        "shard": {"image": "png", "samples": 5},
    }
    return Arm(name, config)


@pytest.fixture(scope="module")
def arms(references):  # noqa: F811
    return [
        arm("slerp", references, {"method": "slerp", "points": 3}, unit=6, batch=6),
        arm("cog", references, {"method": "cog", "points": 3}, unit=6, batch=6),
        arm("ends", references, {"method": "lerp", "t": 0.0}, unit=6, batch=6),
        arm("noise", references, None, unit=6, batch=6),
        arm("poisoned", references, None, unit=3, batch=1,
            generate={"method": "tests.small_build:Poisoned", "share": 0.4}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(str(tmp_path_factory.mktemp("arms")))


@pytest.fixture(scope="module")
def built(arms, store):
    return make(arms, store.uri, RUN)


@pytest.fixture(scope="module")
def observers() -> Observers:
    return Observers()


@pytest.fixture(scope="module")
def seen(built, store, observers):
    return {name: look(store, one, observers) for name, one in built.items()}


def test_a_second_run_makes_nothing(arms, store, built):
    def data():
        """Every file but the record of which build was asked for last."""
        return {n: f for n, f in listing(Path(store.uri)).items() if n.split("/")[0] in FOLDERS}

    before = data()
    again = make(arms, store.uri, RUN)
    assert [one.made for one in again.values()] == [False] * len(arms)
    assert {n: one.manifest for n, one in again.items()} == {n: one.manifest for n, one in built.items()}
    assert {n: one.seconds for n, one in again.items()} == {n: one.seconds for n, one in built.items()}
    assert data() == before


def test_arms_share_their_seeds(store, built):
    """Three arms combine the seeds of two classes with four references each, and eight were inverted."""
    assert len(list(Path(store.uri, "seeds").glob("*/*"))) == 8


def test_arms_draw_the_same_seeds_in_the_same_places(store, built, seen):
    assert seen["slerp"].keys == seen["cog"].keys == seen["noise"].keys
    assert seen["slerp"].groups == seen["cog"].groups != seen["noise"].groups
    of_slerp, of_cog = (
        {(r["class"], r["index"]): (r["parents"], r["weights"]) for r, _ in read(store, built[name])}
        for name in ("slerp", "cog")
    )
    assert of_slerp == of_cog
    assert [of_slerp["circle", i][1][1] for i in range(3)] == [0.25, 0.5, 0.75]
    # three points of a pair, and each image of noise by itself
    assert len(set(seen["slerp"].groups)) == 2 * PAIRS
    assert len(set(seen["noise"].groups)) == 2 * PAIRS * 3


def test_images_are_those_of_the_build(store, built, observers, seen):
    """Pixels come from the bytes of the shards, and stay beside their keys."""
    by_key = {(r["class"], r["recipe"], r["index"]): (r, data) for r, data in read(store, built["cog"])}
    rows = [by_key[key] for key in seen["cog"].keys]
    assert len(rows) == len(by_key) == 6 * PAIRS
    pixels = torch.stack([torch.from_numpy(np.array(images.decode(d))).permute(2, 0, 1) for _, d in rows])
    expected = observers.look(pixels)
    np.testing.assert_array_equal(seen["cog"].features.judge_ND, expected.judge_ND)
    np.testing.assert_array_equal(seen["cog"].norm_N, [row["seed_norm"] for row, _ in rows])


def test_the_same_seed_drawn_twice_counts_once(store, built, seen):
    ends = seen["ends"]
    hashes = {(r["class"], r["recipe"], r["index"]): r["image_sha256"] for r, _ in read(store, built["ends"])}
    assert ends.distinct_N.sum() == len(set(hashes.values())) < len(ends.keys)
    # a weight of 0 takes nothing from the second seed, so the group is the first one's
    assert len(set(ends.groups)) == len(set(hashes.values()))


def test_what_failed_was_not_recognised(store, built, seen, observers):
    poisoned = seen["poisoned"]
    assert poisoned.failed
    assert len(poisoned.keys) + len(poisoned.failed) == 6 * PAIRS
    assert built["poisoned"].manifest.shortfall == len(poisoned.failed)
    table = Table("t", "", {n: View(n) for n in ("noise", "poisoned")}, (("poisoned", "noise"),))
    real = Real.seen_by(observers, ["circle", "gear"], 10)
    result = tabulate(table, seen, real, built)
    common = len(poisoned.keys)
    for row in result.rows.values():
        assert row["accuracy"].n == 6 * PAIRS
        assert row["frechet_clip"].n == row["frechet_judge"].n == row["diversity"].n == common
    hits = sum(CLASSES[v] == k[0] for v, k in zip(poisoned.features.verdict_N, poisoned.keys, strict=True))
    assert result.rows["poisoned"]["accuracy"].value == pytest.approx(hits / (6 * PAIRS))
    assert result.builds["noise"] == built["noise"].manifest.build_id


def test_a_view_is_one_recipe_or_some_classes(seen, observers):
    real = Real.seen_by(observers, ["circle", "gear"], 10)
    rows = {
        "all": View("noise"),
        "circles": View("noise", classes=("circle",)),
        "pair": View("noise", ("pair",)),
    }
    alone = Table("circles", "", {"circles": rows["circles"]}, ())
    assert tabulate(alone, seen, real, {}).rows["circles"]["frechet_clip"].n == 3 * PAIRS
    both = tabulate(Table("both", "", {k: rows[k] for k in ("all", "pair")}, ()), seen, real, {}).rows
    assert both["all"]["frechet_judge"].value == both["pair"]["frechet_judge"].value
    with pytest.raises(UserError, match="no image was drawn in all of its rows"):
        tabulate(Table("none", "", {"x": View("noise", ("other",))}, ()), seen, real, {})


def test_the_real_drawings_are_new_and_look_real(seen, observers):
    assert "evaluation" not in SPLITS
    labels, pixels = drawings(["gear"], 3, rng_seed=0)
    assert labels == ["gear"] * 3
    first, _ = draw("gear", generator("evaluation", "gear", 0, 0))
    np.testing.assert_array_equal(pixels[0].permute(1, 2, 0), np.asarray(first))
    control = drawn_like(seen["noise"], observers)
    assert control.keys == seen["noise"].keys
    verdicts = [CLASSES[v] for v in control.features.verdict_N]
    assert sum(v == k[0] for v, k in zip(verdicts, control.keys, strict=True)) >= len(verdicts) - 1
    real = Real.seen_by(observers, ["circle", "gear"], 10)
    rows = {"noise": View("noise"), "real": View("real")}
    found = tabulate(Table("t", "", rows, (("real", "noise"),)), {**seen, "real": control}, real, {})
    assert found.differences["real", "noise", "accuracy"].verdict == "higher"
    assert found.differences["real", "noise", "frechet_clip"].verdict == "lower"


def test_a_damaged_shard_is_not_judged(references, tmp_path):  # noqa: F811
    store = Store(str(tmp_path))
    done = make([arm("noise", references, None, unit=6, batch=6)], store.uri, RUN)["noise"]
    tar = next(tmp_path.glob("builds/*/shards/*.tar"))
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(Damaged, match="damaged"):
        list(read(store, done))


def test_an_arm_that_is_no_build_is_told_in_one_line_before_anything_is_made(references, tmp_path):  # noqa: F811
    wrong = arm("bad", references, {"method": "slurp"})
    with pytest.raises(UserError, match=r"arm 'bad': .*unknown combine method 'slurp'") as told:
        make([arm("good", references, None), wrong], str(tmp_path / "out"), RUN)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_the_time_of_a_path_is_that_of_its_points(built, monkeypatch):
    from stages.combine.cog import Cog

    calls = []
    inner = Cog.__call__

    def counted(self, z_KCHW, weights, artifact):
        calls.append((tuple(z_KCHW.shape[1:]), weights[1]))
        return inner(self, z_KCHW, weights, artifact)

    monkeypatch.setattr(Cog, "__call__", counted)
    found = milliseconds(built["cog"], "pair", (4, 64, 64), paths=2, limit=60)
    assert (found.n, found.low) == (2, None)
    assert found.value > 0
    # one path to warm up, then two, of three points each
    assert calls == [((4, 64, 64), t) for t in (0.25, 0.5, 0.75)] * 3
    assert milliseconds(built["cog"], "pair", None, paths=9, limit=0).n == 3


def test_rows_of_a_table_stay_with_their_images():
    features = Features(np.arange(3), *(np.arange(3.0)[:, None],) * 3)
    keys = (("a", "p", 0), ("a", "p", 1), ("b", "p", 0))
    whole = Seen(keys, keys, np.array([1.0, 0, 1]), np.array([7.0, 8, 9]), features, (("b", "p", 1),))
    kept = whole.only(lambda key: key[0] == "b")
    assert (kept.keys, kept.failed) == ((("b", "p", 0),), (("b", "p", 1),))
    assert (kept.norm_N.tolist(), kept.features.verdict_N.tolist()) == ([9.0], [2])
