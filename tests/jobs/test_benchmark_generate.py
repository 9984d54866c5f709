"""The benchmark of generating: all ways draw the same images, and the figures belong together."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from jobs.benchmarks.generate import ONE, OURS, THEIRS, Case, describe, matrix_rate, measure, work
from jobs.benchmarks.models import model
from tests.jobs.test_benchmark_models import TINY

CPU = torch.device("cpu")
CASES = {
    name: Case("sd", 4, guidance, 2, name)
    for name, guidance in (("ddim", 3.0), ("euler", 1.0), ("lightning", 3.0), ("dpm_solver++", 3.0))
}


@pytest.fixture(scope="module")
def facts():
    return measure(CASES, CPU, torch.float32, 1, shapes=TINY)


def test_ours_are_the_images_of_the_pipeline(facts):
    for case in facts["cases"].values():
        assert case["grey_levels_apart"] <= 1


def test_the_figures_belong_together(facts):
    case = facts["cases"]["ddim"]
    tflop = case["tflop"]
    assert tflop["image"] == pytest.approx(4 * 2 * tflop["call"] + tflop["decoding"])  # guidance: two calls
    assert list(case["ways"]) == [OURS, THEIRS, ONE]
    for way in case["ways"].values():
        assert way["images_per_second"] == pytest.approx(2 / way["seconds"])
        assert way["tflops"] == pytest.approx(tflop["image"] * way["images_per_second"])
        assert way["peak_bytes"] > 10**8
    unguided = facts["cases"]["euler"]["tflop"]
    assert unguided["image"] == pytest.approx(4 * unguided["call"] + unguided["decoding"])
    assert "| ddim: 16², 4 × ddim, guidance 3, batch 2 | ours |" in describe(facts)


@pytest.mark.parametrize(("name", "published"), [("sd15", 0.803), ("sd21", 0.804), ("sdxl", 6.761)])
def test_work_of_a_call_is_the_published_one(name, published):
    """TFLOP of one forward pass, attention included, and 2.51 or 10.47 of decoding 512² or 1024² pixels."""
    call, decoding = work(model(name, torch.device("meta"), torch.bfloat16))
    assert call / 1e12 == pytest.approx(published, rel=0.02)
    assert decoding / 1e12 == pytest.approx(10.47 if name == "sdxl" else 2.51, rel=0.02)


def test_a_matrix_product_is_no_faster_than_the_machine():
    assert 1e9 < matrix_rate(CPU, torch.float32) < 1e13


def test_ray_is_not_needed():
    code = "import sys, jobs.benchmarks.generate; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
