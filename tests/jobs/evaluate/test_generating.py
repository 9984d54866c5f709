"""The evaluations of generating, small but whole: every row has its figures, every page opens."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.evaluate.hard_negatives import ADA, RATIOS, between
from jobs.evaluate.hard_negatives import headings as between_headings
from jobs.evaluate.minority import MEASURED, METHODS, PRDC
from jobs.evaluate.minority import headings as minority_headings
from jobs.evaluate.rare import COUNTED, PLAIN, PUBLISHED, REFINED, STARTS
from jobs.tangram.drawings import CLASSES, RARE
from tests.small_build import seedloom  # noqa: F401  fixture

LOCAL = ("--runner", "local", "--quick")


def _figures(path):
    return {(r["table"], r["row"], r["metric"]): r["value"] for r in pq.read_table(path).to_pylist()}


@pytest.mark.timeout(600)
def test_hard_negatives_are_measured_between_their_classes(seedloom, tmp_path):  # noqa: F811
    ended = seedloom("evaluate", "hard-negatives", *LOCAL, "--out", tmp_path)
    assert ended.code == 0, ended.err
    found = _figures(tmp_path / "hard-negatives.parquet")
    rows = [*(f"r = {ratio}" for ratio in RATIOS), ADA]
    for row in rows:
        assert {m for _, r, m in found if r == row} == set(between_headings()) | {"norm"}
    at = {row: {m: found["hard negatives", row, m] for m in between_headings()} for row in rows}
    assert [at[row]["ratio"] for row in rows[:-1]] == pytest.approx(RATIOS)
    assert 0.5 <= at[ADA]["ratio"] <= 0.9
    # little noise leaves the source, much of it draws the target
    assert at["r = 0.3"]["p_source"] > at["r = 1.0"]["p_source"] + 0.1
    assert at["r = 1.0"]["p_target"] > at["r = 0.3"]["p_target"] + 0.1
    summary = (tmp_path / "hard-negatives.txt").read_text()
    assert "3 classes, 2 images each from 1 most confused classes" in summary
    for name in ("hard-negatives", "hard_negatives", "trajectory"):
        assert Image.open(tmp_path / f"{name}.png").width > 600


@pytest.mark.timeout(600)
def test_minorities_are_measured_beside_what_they_are_compared_with(seedloom, tmp_path):  # noqa: F811
    ended = seedloom(
        "evaluate", "minority", *LOCAL, "--out", tmp_path, "--class", "circle", "--class", "gear"
    )
    assert ended.code == 0, ended.err
    found = _figures(tmp_path / "minority.parquet")
    for row in METHODS:
        assert {m for _, r, m in found if r == row} == set(minority_headings()) | {"norm"}
    real = {m: v for (_, r, m), v in found.items() if r == "real drawings"}
    assert set(real) == set(minority_headings()) - set(MEASURED)  # nothing measured them in a build
    assert all(0 <= found["minority", row, m] <= 1 for row in METHODS for m in PRDC[:2])
    told = (tmp_path / "minority.txt").read_text()
    for name in list(METHODS)[1:]:
        assert f"{name}: images are not shown to differ in likelihood from DDIM's; CLIPScore" in told


@pytest.mark.timeout(600)
def test_rare_classes_are_measured_with_and_without_seedselect(seedloom, tmp_path):  # noqa: F811
    ended = seedloom("evaluate", "rare", *LOCAL, "--out", tmp_path, "--class", "circle", "--class", RARE[0])
    assert ended.code == 0, ended.err
    found = _figures(tmp_path / "rare.parquet")
    further = {"iterations to acceptance", "few, 3 images a class"}
    assert {t for t, _, _ in found} == {"many", "few", "all"} | further
    both = [*STARTS, *(start + REFINED for start in STARTS)]
    for row in both:
        assert {m for t, r, m in found if (t, r) == ("few", row)} >= {
            "accuracy",
            "frechet_judge",
            "s_generate",
        }
        assert ("all", row, "accuracy") in found
    for row in (PLAIN, PLAIN + REFINED):
        assert ("few, 3 images a class", row, "accuracy") in found
    assert ("few", PLAIN + PUBLISHED, "accuracy") in found
    assert ("all", PLAIN + PUBLISHED, "accuracy") not in found  # it is made for rare classes alone
    refined, plain = (found["few", row, "s_generate"] for row in ("nao path" + REFINED, "nao path"))
    assert refined > plain
    for start in COUNTED:
        table = "iterations to acceptance"
        assert 0 <= found[table, start, "iterations"] <= 1
        assert 0 <= found[table, start, "accepted"] <= 1


def test_an_image_is_near_the_boundary_when_the_two_classes_share_it():
    """Not where the classifier gives neither of them anything."""
    probability_NK = np.zeros((3, len(CLASSES)))
    probability_NK[0, :2] = 0.6, 0.4  # near
    probability_NK[1, :2] = 0.9, 0.1  # far
    probability_NK[2, :2] = 0.1, 0.1  # some third class
    row = {"source_class": CLASSES[0], "class": CLASSES[1], "noise_ratio": 0.5}
    features = SimpleNamespace(probability_NK=probability_NK, verdict_N=np.array([0, 0, 5]))
    found = between(SimpleNamespace(rows=[row] * 3, features=features, groups=(0, 1, 2)))
    assert found["near"].value == pytest.approx(1 / 3)
    assert found["still_source"].value == pytest.approx(2 / 3)
    assert found["p_target"].value == pytest.approx(0.6 / 3)


@pytest.mark.parametrize("evaluation", ["hard-negatives", "minority", "rare"])
def test_a_class_that_there_is_not_is_told_in_one_line(seedloom, tmp_path, evaluation):  # noqa: F811
    ended = seedloom("evaluate", evaluation, *LOCAL, "--out", tmp_path / "out", "--class", "gryphon")
    assert ended.code == 2
    assert "--class 'gryphon': tangram has no such class; allowed: circle" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "out" / "builds").exists()
