"""SLERP at the norm of typical noise: SLERP's direction, one norm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.slerp import slerp
from stages.combine.slerp_rescaled import SlerpRescaled, slerp_rescaled


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), scale=st.floats(0.3, 3))
@settings(deadline=None)
def test_the_direction_is_slerps_and_the_norm_is_the_mode(seed, t, scale):
    a, b = noise(2, 4, 4, 4, seed=seed)
    z, raw = slerp_rescaled(a, scale * b, t), slerp(a, scale * b, t)
    assert float(z.norm()) == pytest.approx(63**0.5, rel=1e-12)
    torch.testing.assert_close(z / z.norm(), raw / raw.norm(), rtol=0, atol=1e-12)


def test_the_ends_are_the_seeds_at_that_norm():
    a, b = noise(2, 4, 4, 4)
    torch.testing.assert_close(slerp_rescaled(a, b, 0.0), a * 63**0.5 / a.norm())
    torch.testing.assert_close(slerp_rescaled(a, b, 1.0), b * 63**0.5 / b.norm())


def test_the_stage_goes_to_the_weight_of_the_second_parent():
    z_KCHW = noise(2, 4, 4, 4).float()
    stage = SlerpRescaled(SlerpRescaled.Config())
    assert torch.equal(stage(z_KCHW, (0.7, 0.3), {}), slerp_rescaled(z_KCHW[0], z_KCHW[1], 0.3))
