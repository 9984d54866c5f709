"""The benchmarks of SeedSelect, MinorityPrompt and inversion: ways do the same work, and figures agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from jobs.benchmarks import inversion, minority, models, seedselect
from stages.contract import Sampler
from tests.jobs.test_benchmark_models import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def refined(tangram):
    clip = models.clip("tangram", CPU)
    return seedselect.measure(tangram, tangram, clip, clip, Sampler(5, 7.5), batch=2, iterations=2, runs=1)


def test_both_ways_of_refining_end_at_the_same_loss_and_below_the_first(refined):
    ours, loop = (refined["ways"][name]["losses"] for name in (seedselect.OURS, seedselect.LOOP))
    assert ours == pytest.approx(loop, rel=0.01)
    for start, end in zip(refined["start"], ours, strict=True):
        assert end < start


def test_seeds_an_hour_follow_from_the_seconds(refined):
    for way in refined["ways"].values():
        assert way["seeds_per_hour"] == pytest.approx(2 * 3600 / way["seconds"])
        assert way["fastest"] <= way["seconds"] <= way["slowest"]
    text = seedselect.describe({"model": "tangram", **refined})
    assert refined["hardware"] in text
    assert f"{refined['faster']:.2f} ×" in text


def test_a_random_model_is_refined_with_a_random_clip():
    """What runs full-size on a GPU, with small shapes."""
    backbone = models.model("sd", CPU, torch.float32, TINY)
    clip = models.clip("sd", CPU, torch.float32, architecture="RN50-quickgelu")
    found = seedselect.measure(backbone, backbone, clip, clip, Sampler(3, 1.0), batch=2, iterations=1, runs=1)
    assert found["ways"]["ours"]["losses"] == pytest.approx(found["ways"]["loop"]["losses"], rel=0.01)


def test_minority_prompt_asks_the_model_as_often_as_its_optimiser_needs(tangram):
    found = minority.measure(tangram, batch=2, steps=10, guidance=2.0, runs=1)
    plain, rare = (found["ways"][name] for name in (minority.PLAIN, minority.MINORITY))
    # of ten steps the first is above 0.9 of all timesteps; ten iterations of two calls are made there
    assert (plain["calls"], rare["calls"]) == (10, 10 + 2 * 10)
    assert found["slower"] == pytest.approx(rare["seconds"] / plain["seconds"])
    assert f"{found['slower']:.2f} ×" in minority.describe({"model": "tangram", **found})


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_random_models_learn_words(kind):
    backbone = models.model(kind, CPU, torch.float32, TINY)
    word_D = backbone.word(None).clone().requires_grad_()
    text = backbone.embed_words("a ring *", {"*": word_D.expand(2, -1)})
    plain = backbone.embed(["a ring *"])
    assert text.tokens_BLD.shape == (2, *plain.tokens_BLD.shape[1:])
    assert torch.equal(text.tokens_BLD[1, :-1], plain.tokens_BLD[0, :-1])
    text.tokens_BLD.sum().backward()
    assert torch.equal(word_D.grad, torch.full_like(word_D, 2))


def test_every_inversion_that_can_run_is_measured(tangram):
    found = inversion.measure(tangram, inversion.images("tangram", 64, 2), runs=1)
    assert set(found["ways"]) == {"belm", "ddim", "fixed_point", "regularized"}
    for way in found["ways"].values():
        assert way["images_per_second"] == pytest.approx(2 / way["seconds"])
        assert way["norm_ratio"] == pytest.approx(1, abs=0.2)
    assert found["ways"]["ddim"]["calls"] == 50
    text = inversion.describe({"model": "tangram", **found})
    assert "latent MSE" in text
    assert "latent MSE" not in inversion.describe({"model": "sd15", **found})  # random weights


def test_a_flow_is_inverted_as_a_flow():
    backbone = models.model("sd3", CPU, torch.float32, TINY)
    found = inversion.measure(backbone, inversion.images("sd3", backbone.image_size, 1), runs=1)
    assert set(found["ways"]) == {"belm", "fixed_point", "flow"}


@pytest.mark.parametrize("name", ["seedselect", "minority", "inversion", "shards", "everything"])
def test_ray_is_not_needed(name):
    code = f"import sys, jobs.benchmarks.{name}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
