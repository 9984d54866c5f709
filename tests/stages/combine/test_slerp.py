"""SLERP's geometry, and what a candidate draws."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.combine.slerp import PARALLEL, Slerp, slerp, slerp_weights
from stages.contract import Chance

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
@settings(deadline=None)
def test_on_the_sphere_the_angle_is_the_fraction(seed, t):
    a, b = (z / z.norm() for z in pair(seed))
    z = slerp(a, b, t)
    assert float(z.norm()) == pytest.approx(1)
    assert (angle(a, z), angle(z, b)) == pytest.approx((t * angle(a, b), (1 - t) * angle(a, b)), abs=1e-6)


@given(seed=rng_seeds, t=fractions, scale=st.floats(0.1, 10))
@settings(deadline=None)
def test_norm_follows_the_formula_of_the_weights_on_the_seeds_themselves(seed, t, scale):
    a, b = pair(seed, scale)
    theta = angle(a, b)
    s0, s1 = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    expected = s0**2 * (a * a).sum() + s1**2 * (b * b).sum() + 2 * s0 * s1 * (a * b).sum()
    assert float(slerp(a, b, t).square().sum()) == pytest.approx(float(expected), rel=1e-9)


@given(seed=rng_seeds, t=fractions)
@settings(deadline=None)
def test_ends_and_symmetry(seed, t):
    a, b = pair(seed)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t))


@given(seed=rng_seeds, t=fractions)
@settings(deadline=None)
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


@given(seed=rng_seeds, t=fractions)
@settings(deadline=None)
def test_each_pair_of_a_batch_takes_its_own_case(seed, t):
    """Ordinary, nearly parallel and equal seeds beside each other, each at its own t."""
    a, b = pair(seed)
    first, second = torch.stack([a, a, a]), torch.stack([b, a + 1e-3 * b, a])
    t_B = torch.tensor([t, 1 - t, t / 2], dtype=torch.float64)
    together = slerp(first, second, t_B)
    for i in range(3):
        torch.testing.assert_close(together[i], slerp(first[i], second[i], float(t_B[i])), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no great circle"):
        slerp(first, torch.stack([b, b, -a]), t_B)


def test_the_weights_hardly_jump_where_the_chord_takes_over():
    a, b = torch.eye(64, dtype=torch.float64)[:2].reshape(2, 4, 4, 4)
    angles = np.arccos(PARALLEL) + np.array([-1e-9, 1e-9])
    below, above = (slerp_weights(a, np.cos(x) * a + np.sin(x) * b, 0.3) for x in angles)
    assert float(below[1]) == 0.3
    assert float(above[1]) == pytest.approx(0.3, abs=5e-5)
    assert float(above[1]) != 0.3


def test_the_stage_goes_to_the_weight_of_the_second_parent():
    a, b = pair(2)
    method = Slerp(Slerp.Config(t=0.25))
    combination = method.draw(Chance(0, (1,)), 2)
    assert combination.weights == (0.75, 0.25)
    assert torch.equal(method(torch.stack([a, b]), combination.weights, {}), slerp(a, b, 0.25))
    assert method.seeds_needed() == 2


def test_a_fraction_outside_the_arc_is_refused():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Slerp.Config(t=1.5)
