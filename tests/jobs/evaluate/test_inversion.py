"""`seedloom evaluate inversion`: its statistics, its sets of images, and the command from end to end."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.evaluate.inversion import DECIDING, MEASURED, VARIANTS, atypical, decision, proxy_a_distance
from jobs.evaluate.sets import image_sets, training_drawings
from jobs.tangram.data import to_model
from jobs.tangram.drawings import CLASSES, COUNTS, HEAD, RARE, draw, generator
from stages import registry
from stages.gaussianity import gaussianity
from tests.small_build import seedloom  # noqa: F401  fixture


def test_noise_is_about_one_standard_deviation_from_noise():
    z_NCHW = torch.randn(400, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    squares = [atypical(measures, 1024) ** 2 for measures in gaussianity(z_NCHW)]
    assert np.mean(squares) == pytest.approx(1, abs=0.15)
    (small,) = gaussianity(0.8 * z_NCHW[:1])
    # |z|/√d is 0.2 too small, and its standard deviation is 1/√(2d)
    assert atypical(small, 1024) == pytest.approx(0.2 * 2048**0.5 / 3**0.5, rel=0.1)


def test_proxy_a_distance_of_sets_that_are_one_and_that_are_far_apart():
    rng = np.random.default_rng(0)
    x_ND, y_MD = rng.standard_normal((400, 3)), rng.standard_normal((400, 3))
    alone, other = [f"x{i}" for i in range(400)], [f"y{i}" for i in range(400)]
    near, wrong = proxy_a_distance(x_ND, y_MD, alone, other)
    assert near == pytest.approx(0, abs=0.25)
    assert near == pytest.approx(2 * (1 - 2 * wrong.mean()))
    assert proxy_a_distance(x_ND, y_MD + 20, alone, other)[0] == 2
    # N(0, 1) and N(2, 1) along one axis: the best linear error is Φ(−1) = 0.1587
    shifted = y_MD + np.array([2.0, 0, 0])
    assert proxy_a_distance(x_ND, shifted, alone, other)[0] == pytest.approx(2 * (1 - 2 * 0.1587), abs=0.15)


def test_what_comes_from_one_source_is_held_out_together():
    """Twenty copies of ten points of one distribution: a classifier that saw some copies knows the others."""
    rng = np.random.default_rng(1)
    x_ND, y_MD = (np.repeat(rng.standard_normal((10, 30)), 20, axis=0) for _ in range(2))
    sources = np.repeat(np.arange(10), 20)
    together, _ = proxy_a_distance(x_ND, y_MD, [f"x{s}" for s in sources], [f"y{s}" for s in sources])
    leaking, _ = proxy_a_distance(x_ND, y_MD, [f"x{i}" for i in range(200)], [f"y{i}" for i in range(200)])
    assert leaking == 2
    assert together < 1


def test_image_sets_are_what_they_say_and_the_same_each_time():
    sets = {images.name: images for images in image_sets(24)}
    again = {images.name: images for images in image_sets(24)}
    for name, images in sets.items():
        assert images.image_N3hw.shape == (24, 3, 64, 64), name
        assert images.image_N3hw.abs().max() <= 1
        assert images.image_N3hw.flatten(1).std(dim=1).min() > 0.02, f"{name}: an image shows nothing"
        assert torch.equal(images.image_N3hw, again[name].image_N3hw)
        assert len(images.prompts) == len(images.sources) == 24
    for name, classes in (("head", HEAD), ("rare", RARE)):
        prompts = set(sets[f"drawings, {name} classes"].prompts)
        assert prompts == {f"a photo of a {label.replace('_', ' ')}" for label in classes}
    assert set(sets["photographs"].prompts) == {""}
    assert len(set(sets["photographs"].sources)) == 9
    few = sets["photographs"].first(9)
    assert len(set(few.sources)) == 9


def test_training_drawings_are_those_of_the_training_set():
    training = training_drawings(40)
    labels = [prompt.removeprefix("a photo of a ").replace(" ", "_") for prompt in training.prompts]
    used = dict.fromkeys(CLASSES, 0)
    for label, image_3hw in zip(labels, training.image_N3hw, strict=True):
        picture, _ = draw(label, generator("train", label, used[label]))
        used[label] += 1
        expected = to_model(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        torch.testing.assert_close(image_3hw, expected)
    assert used["circle"] > used["hexagon"]
    assert all(used[label] <= count for label, count in COUNTS.items())
    held_out = next(images for images in image_sets(8) if images.name == "drawings as in training")
    same = (held_out.image_N3hw[:, None] == training.image_N3hw[None]).flatten(2).all(dim=2)
    assert not same.any()


def arms(**measures):
    """Three sets of two images for each method and number of steps, all with the same measures."""
    return {
        (name, method, steps): [dict.fromkeys(MEASURED, 0.0) | own] * 2
        for name in DECIDING
        for (method, steps), own in measures["of"].items()
    }


def test_the_decision_names_what_nothing_beats_and_compares_with_naive_ddim():
    lines = decision(
        arms(of={
            ("ddim", 50): {"latent_mse": 1.6, "atypical": 8, "calls": 50, "norm_ratio": 0.8},
            ("ddim", 100): {"latent_mse": 0.4, "atypical": 6, "calls": 100, "norm_ratio": 0.85},
            ("good", 50): {"latent_mse": 0.05, "atypical": 5, "calls": 100, "norm_ratio": 0.99},
            ("dear", 50): {"latent_mse": 0.01, "atypical": 2, "calls": 300, "norm_ratio": 1.0},
        })
    )  # fmt: skip
    best = [line.strip() for line in lines if line.startswith("  ")]
    assert [line.split(":")[0] for line in best] == ["ddim, 50 steps", "good, 50 steps", "dear, 50 steps"]
    assert "most typical seeds at no more than 150 calls: good, 50 steps" in lines
    assert "good, 50 steps; 32.0 × lower than ddim's at 50 steps (target 16 ×: reached)" in lines[-1]
    assert "8.0 × lower than ddim's at 100 calls; norm/√d 0.990 (target 1 ± 0.02: reached)" in lines[-1]


@pytest.mark.timeout(600)
def test_every_inversion_on_every_set_and_a_second_run_measures_nothing(seedloom, tmp_path):  # noqa: F811
    command = ("evaluate", "inversion", "--quick", "--steps", 2, "--out", tmp_path)
    ended = seedloom(*command)
    assert ended.code == 0, ended.err
    rows = pq.read_table(tmp_path / "inversion.parquet").to_pylist()
    found = {(r["table"], r["row"], r["metric"]): r for r in rows}
    methods = [name for name in registry.names("invert") if name != "flow"] + list(VARIANTS)
    for images in image_sets(2):
        assert ("proxy A-distance", images.name, "pad") in found
        for method in methods:
            for metric in MEASURED:
                figure = found[images.name, f"{method}, 2 steps", metric]
                assert figure["n"] == 2
                assert figure["low"] is not None
    assert found["digits", "ddim, 2 steps", "calls"]["value"] == 2
    assert found["proxy A-distance", "photographs", "pad"]["value"] > 1.5
    assert "flow is left out: it inverts flow-matching models" in ended.out
    count = 8 * len(methods)
    assert f"{count} of {count} inversions measured now" in ended.out

    again = seedloom(*command)
    assert f"0 of {count} inversions measured now" in again.out
    assert pq.read_table(tmp_path / "inversion.parquet").to_pylist() == rows


def test_more_steps_than_there_are_are_told_before_anything_is_measured(seedloom, tmp_path):  # noqa: F811
    command = ("evaluate", "inversion", "--quick", "--steps", 2, "--steps", 5000, "--out", tmp_path)
    ended = seedloom(*command)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "seedloom: 5000 sampling steps given; this backbone has 1 to 1000\n"
    assert not list(tmp_path.glob("measures/*-*"))
