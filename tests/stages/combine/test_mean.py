"""Means: their norms, and that only the norm sets them apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.cog import cog
from stages.combine.mean import euclidean, mode_norm, normalized, standardized

rng_seeds = st.integers(0, 10**6)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(k, seed):
    return torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + 0.1


@given(seed=rng_seeds, k=st.integers(1, 8), scale=st.floats(0.1, 10))
@settings(deadline=None)
def test_each_has_its_norm_whatever_the_seeds_norms(seed, k, scale):
    z, w = scale * noise(k, 4, 4, 4, seed=seed), weights(k, seed)
    assert float(normalized(z, w).norm()) == pytest.approx(63**0.5, rel=1e-12)
    assert float(mode_norm(z, w).norm()) == pytest.approx(62**0.5, rel=1e-12)
    standard = standardized(z, w)
    assert float(standard.norm()) == pytest.approx(8, rel=1e-12)
    assert float(standard.mean()) == pytest.approx(0, abs=1e-12)
    assert float(standard.std(correction=0)) == pytest.approx(1, rel=1e-12)


@given(seed=rng_seeds, k=st.integers(1, 8))
@settings(deadline=None)
def test_the_mean_minimises_the_squared_distances(seed, k):
    z, w = noise(k, 4, 4, 4, seed=seed), weights(k, seed)
    mean = euclidean(z, w)

    def cost(point):
        return float((w * (z - point).flatten(1).square().sum(dim=1)).sum())

    assert all(cost(mean + 0.01 * step) > cost(mean) for step in noise(10, 4, 4, 4, seed=seed + 2))
    residual = (w[:, None, None, None] * (z - mean)).sum(dim=0)
    assert float(residual.abs().max()) == pytest.approx(0, abs=1e-12)


def test_the_mean_of_independent_seeds_is_far_from_typical():
    for k in (3, 10, 25):
        assert float(euclidean(noise(k, 4, 64, 64)).norm()) == pytest.approx(128 / k**0.5, rel=0.02)


def test_for_independent_seeds_the_rescaled_ones_and_cog_are_nearly_the_same():
    z = noise(5, 4, 64, 64)
    middle = normalized(z)
    for other in (mode_norm(z), standardized(z), cog(z)):
        assert float(other.norm() / middle.norm()) == pytest.approx(1, abs=0.01)
        assert float(torch.cosine_similarity(other.flatten(), middle.flatten(), dim=0)) > 0.9999
    torch.testing.assert_close(mode_norm(z) / mode_norm(z).norm(), middle / middle.norm())
    torch.testing.assert_close(cog(z) / cog(z).norm(), middle / middle.norm())


def test_a_weight_of_zero_leaves_a_seed_out():
    z = noise(3, 4, 4, 4)
    w = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(euclidean(z, w), 0.25 * z[0] + 0.75 * z[2])
    for method in (normalized, mode_norm, standardized):
        torch.testing.assert_close(method(z, w), method(z[[0, 2]], w[[0, 2]]))
