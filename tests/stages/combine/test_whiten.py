"""Whitening: uncorrelated seeds of norm √d, nearest to the given; and what correlation does without it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.cog import Cog, cog
from stages.combine.geometric_median import geometric_median
from stages.combine.karcher import karcher
from stages.combine.mean import euclidean
from stages.combine.whiten import whiten

D = 1024


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(z):
    flat = z.flatten(-3)
    return flat @ flat.mT / flat.shape[-1]


def correlated(k, rho, seed=0):
    """K latents of norm √d whose cosines are exactly ρ."""
    orthonormal, _ = torch.linalg.qr(noise(D, k, seed=seed))
    root = torch.linalg.cholesky(torch.full((k, k), rho, dtype=torch.float64).fill_diagonal_(1.0))
    return (D**0.5 * root @ orthonormal.mT).reshape(k, 4, 16, 16)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 8), shift=st.floats(0, 1))
@settings(deadline=None)
def test_the_seeds_become_orthogonal_and_of_norm_root_d(seed, k, shift):
    z = noise(k, 4, 4, 4, seed=seed) + shift
    torch.testing.assert_close(gram(whiten(z)), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)


@given(seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_no_other_uncorrelated_seeds_are_nearer(seed):
    """Procrustes: Σ‖z̃ − z‖² is least for G^{-1/2}; a rotation of the whitened seeds is further away."""
    z = noise(5, 4, 4, 4, seed=seed) + 0.3
    white = whiten(z)
    rotation, _ = torch.linalg.qr(torch.eye(5, dtype=torch.float64) + 0.3 * noise(5, 5, seed=seed + 1))
    rotated = torch.einsum("jk,kchw->jchw", rotation * rotation.diagonal().sign(), white)
    torch.testing.assert_close(gram(rotated), gram(white), rtol=0, atol=1e-10)
    assert (white - z).square().sum() < (rotated - z).square().sum()


def test_uncorrelated_seeds_of_norm_root_d_stay_as_they_are():
    z = correlated(6, 0.0)
    torch.testing.assert_close(whiten(z), z, rtol=0, atol=1e-12)


def test_a_batch_is_a_loop():
    z = noise(2, 3, 4, 4, 4, 4)
    torch.testing.assert_close(whiten(z)[1, 2], whiten(z[1, 2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rho", "k", "ratio"), [(0.1, 10, 1.378), (0.05, 3, 1.049), (0.3, 25, 2.864)])
def test_correlation_inflates_cogs_centroid_and_whitening_undoes_it(rho, k, ratio):
    z = correlated(k, rho)
    assert float(cog(z).norm()) == pytest.approx((D * (1 + (k - 1) * rho)) ** 0.5, rel=1e-10)
    assert float(cog(z).norm()) / D**0.5 == pytest.approx(ratio, abs=1e-3)
    for weights in (None, torch.full((k,), 1 / k, dtype=torch.float64), torch.full((k,), -3.0).double()):
        assert float(cog(whiten(z), weights).norm()) == pytest.approx(D**0.5, rel=1e-10)
    stage = Cog(Cog.Config(mode="centroid", group=k, whiten=True))
    assert float(stage(z, (1 / k,) * k, {}).norm()) == pytest.approx(D**0.5, rel=1e-10)


def test_any_weights_give_norm_root_d_once_the_seeds_are_uncorrelated():
    z, w = whiten(correlated(5, 0.2)), noise(7, 5)
    torch.testing.assert_close(
        cog(z, w).flatten(1).norm(dim=1), torch.full((7,), D**0.5, dtype=torch.float64)
    )


def test_centroids_of_whitened_seeds_are_all_in_one_direction():
    """Orthogonal seeds of one norm: no middle is nearer to one of them than to another."""
    z = whiten(noise(6, 4, 8, 8) + 0.2)
    mean = euclidean(z)
    for method in (karcher, geometric_median, cog):
        middle = method(z)
        torch.testing.assert_close(middle / middle.norm(), mean / mean.norm(), rtol=0, atol=1e-10)


def test_dependent_seeds_are_refused():
    z = noise(3, 4, 4, 4)
    for dependent in (torch.stack([z[0], z[1], z[0] - 2 * z[1]]), z[[0, 1, 0]], noise(5, 1, 2, 2)):
        with pytest.raises(ValueError, match="linearly dependent"):
            whiten(dependent)
    with pytest.raises(ValueError, match="linearly dependent"):
        whiten(torch.stack([z[0], z[1], (z[0] + z[1]) / 2]).float())
