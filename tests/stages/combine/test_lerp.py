"""LERP: the chord, what it does to a Gaussian, and its control at SLERP's pace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.lerp import Lerp, chord_fraction, lerp
from stages.combine.slerp import slerp

fractions = st.floats(0, 1)
rng_seeds = st.integers(0, 10**6)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=rng_seeds, t=fractions)
@settings(deadline=None)
def test_the_distance_from_the_first_end_is_the_fraction_of_the_chord(seed, t):
    a, b = noise(2, 4, 4, 4, seed=seed)
    assert torch.equal(lerp(a, b, 0.0), a)
    assert torch.equal(lerp(a, b, 1.0), b)
    z = lerp(a, b, t)
    chord = float((b - a).norm())
    assert (float((z - a).norm()), float((b - z).norm())) == pytest.approx((t * chord, (1 - t) * chord))


def test_halfway_between_independent_seeds_the_deviation_is_the_root_of_a_half():
    a, b = noise(2, 4, 64, 64)
    assert float(lerp(a, b, 0.5).std()) == pytest.approx(0.5**0.5, rel=0.02)
    assert float(lerp(a, b, 0.5).norm()) == pytest.approx(90.5, rel=0.02)


@given(seed=rng_seeds, t=fractions, scale=st.floats(0.3, 3))
@settings(deadline=None)
def test_at_slerps_pace_it_has_slerps_direction(seed, t, scale):
    a, b = noise(2, 4, 4, 4, seed=seed)
    z, on_circle = Lerp(Lerp.Config(pace="angle")).between(a, scale * b, t), slerp(a, scale * b, t)
    torch.testing.assert_close(z / z.norm(), on_circle / on_circle.norm(), rtol=0, atol=1e-12)
    along = float(chord_fraction(a, scale * b, t))
    torch.testing.assert_close(z, a + along * (scale * b - a))  # and is still on the chord


def test_the_middle_is_the_same_at_both_paces_and_a_quarter_is_not():
    a, b = noise(2, 4, 4, 4)
    assert float(chord_fraction(a, b, 0.5)) == pytest.approx(0.5, abs=1e-12)
    orthogonal = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    quarter = float(chord_fraction(orthogonal[0], orthogonal[1], 0.25))
    assert quarter == pytest.approx(2**0.5 - 1 - (2**0.5 - 1) ** 2 / 2**0.5)  # tan 22.5° / (1 + tan 22.5°)


def test_the_stage_goes_to_the_weight_of_the_second_parent():
    z_KCHW = noise(2, 4, 4, 4).float()
    assert torch.equal(Lerp(Lerp.Config())(z_KCHW, (0.7, 0.3), {}), lerp(z_KCHW[0], z_KCHW[1], 0.3))
