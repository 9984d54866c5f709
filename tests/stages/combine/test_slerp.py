"""SLERP's geometry, and what a candidate draws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.ids import random_stream
from stages.combine.slerp import Slerp, slerp

fractions = st.floats(0, 1)
rng_seeds = st.integers(0, 10**6)


def pair(seed, scale=1.0):
    z_KCHW = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return z_KCHW[0], scale * z_KCHW[1]


def angle(a, b):
    return float(
        2 * torch.arctan2((a / a.norm() - b / b.norm()).norm(), (a / a.norm() + b / b.norm()).norm())
    )


@given(seed=rng_seeds, t=fractions)
def test_on_the_sphere_the_angle_is_the_fraction(seed, t):
    a, b = (z / z.norm() for z in pair(seed))
    z = slerp(a, b, t)
    assert float(z.norm()) == pytest.approx(1)
    assert (angle(a, z), angle(z, b)) == pytest.approx((t * angle(a, b), (1 - t) * angle(a, b)), abs=1e-6)


@given(seed=rng_seeds, t=fractions, scale=st.floats(0.1, 10))
def test_norm_follows_the_formula_of_the_weights_on_the_seeds_themselves(seed, t, scale):
    a, b = pair(seed, scale)
    theta = angle(a, b)
    s0, s1 = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    expected = s0**2 * (a * a).sum() + s1**2 * (b * b).sum() + 2 * s0 * s1 * (a * b).sum()
    assert float(slerp(a, b, t).square().sum()) == pytest.approx(float(expected), rel=1e-9)


@given(seed=rng_seeds, t=fractions)
def test_ends_and_symmetry(seed, t):
    a, b = pair(seed)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t))


@given(seed=rng_seeds, t=fractions)
def test_nearly_parallel_seeds_are_interpolated_linearly(seed, t):
    a, b = pair(seed)
    close = a + 1e-3 * b
    torch.testing.assert_close(slerp(a, close, t), (1 - t) * a + t * close)
    torch.testing.assert_close(slerp(a, a, t), a)


def test_opposite_seeds_are_refused_and_almost_opposite_ones_are_not():
    a, b = pair(0)
    with pytest.raises(ValueError, match="no great circle"):
        slerp(a, -3 * a, 0.5)
    with pytest.raises(ValueError, match="no great circle"):
        slerp(a, torch.zeros_like(a), 0.5)
    a, almost = a / a.norm(), (1e-2 * b - a) / (1e-2 * b - a).norm()
    half = slerp(a, almost, 0.5)
    assert (angle(a, half), angle(half, almost)) == pytest.approx((angle(a, almost) / 2,) * 2)
    assert float(half.norm()) == pytest.approx(1)


def test_computed_in_double_and_returned_as_given():
    a, b = (z.float() for z in pair(1))
    assert slerp(a, b, 0.3).dtype == torch.float32
    assert torch.equal(slerp(a, b, 0.3), slerp(a.double(), b.double(), 0.3).float())


def test_a_draw_is_an_unordered_pair_of_distinct_seeds_and_a_uniform_fraction():
    method = Slerp(Slerp.Config())
    draws = [method.draw(random_stream(7, "combine", i), 5) for i in range(2000)]
    pairs, counts = np.unique([draw.parents for draw in draws], axis=0, return_counts=True)
    assert sorted(map(tuple, pairs)) == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert counts.min() > 200 - 5 * 200**0.5
    t = np.array([draw.weights[1] for draw in draws])
    assert np.allclose([sum(draw.weights) for draw in draws], 1)
    assert np.abs(np.sort(t) - (np.arange(2000) + 0.5) / 2000).max() < 1.63 / 2000**0.5  # KS at 1 %


def test_the_stage_goes_to_the_weight_of_the_second_parent():
    a, b = pair(2)
    method = Slerp(Slerp.Config(t=0.25))
    combination = method.draw(random_stream(1), 2)
    assert combination.weights == (0.75, 0.25)
    assert torch.equal(method(torch.stack([a, b]), combination.weights), slerp(a, b, 0.25))
    assert method.seeds_needed() == 2


def test_a_fraction_outside_the_arc_is_refused():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Slerp.Config(t=1.5)
