"""The sampler's step, as a rotation and backwards."""

from math import cos

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Sampler
from stages.invert.rotation import path_of, step_back, velocity, velocity_between
from stages.sampling import ddim_step
from tests.levels import at


@settings(deadline=None)
@given(low=st.floats(0.01, 0.99), share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_a_step_back_is_undone_by_the_samplers_step_also_from_pure_noise(noise, low, share, seed):
    low, high = at(low), at(share * low)
    z_BCHW, v_BCHW = noise(2, 2, 4, 4, 4, seed=seed, dtype=torch.float64)
    high_BCHW = step_back(z_BCHW, v_BCHW, low, high)
    again_BCHW = ddim_step(high_BCHW, v_BCHW, high, low, "v_prediction")
    torch.testing.assert_close(again_BCHW, z_BCHW, rtol=0, atol=1e-12)
    torch.testing.assert_close(velocity_between(z_BCHW, high_BCHW, low, high), v_BCHW, rtol=0, atol=1e-6)


def test_both_kinds_of_a_model_turn_at_one_rate(gaussian_backbone, noise):
    z_BCHW = noise(2, 4, 4, 4, dtype=torch.float64)
    rates = []
    for prediction in ("epsilon", "v_prediction"):
        backbone = gaussian_backbone(prediction)
        level = backbone.schedule.level(500)
        rates.append(velocity(backbone, z_BCHW, 500, level, "star", 3.0))
    torch.testing.assert_close(*rates, rtol=0, atol=1e-12)


def test_the_rate_is_the_derivative_of_the_exact_flow(gaussian_backbone, noise):
    backbone, z_BCHW = gaussian_backbone(), noise(2, 4, 4, 4, dtype=torch.float64)
    level = backbone.schedule.level(300)
    h = 1e-5
    ends = [at(cos(level.angle + shift) ** 2) for shift in (-h, h)]
    before_BCHW, after_BCHW = (backbone.transport(z_BCHW, level, end, "star") for end in ends)
    v_BCHW = velocity(backbone, z_BCHW, 300, level, "star", 1.0)
    torch.testing.assert_close(v_BCHW, (after_BCHW - before_BCHW) / (2 * h), rtol=0, atol=1e-5)


def test_a_last_step_that_leads_nowhere_is_left_out(gaussian_backbone):
    backbone = gaussian_backbone(spacing="linspace")  # its last timestep is 0, and its path ends at ᾱ_0
    path = path_of(backbone, Sampler(10, 1.0))
    assert (len(path.times), len(path.levels)) == (9, 10)
    assert path.times[-1] > 0
    assert len(path_of(gaussian_backbone(spacing="trailing"), Sampler(10, 1.0)).times) == 10


def test_angles_of_known_levels():
    assert [at(a).angle for a in (1.0, 0.5, 0.0)] == pytest.approx([0, torch.pi / 4, torch.pi / 2])
