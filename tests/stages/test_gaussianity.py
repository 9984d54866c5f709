"""What is measured of a latent, on latents whose measures are known."""

import pytest
import scipy.stats
import torch

from stages.gaussianity import gaussianity


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gaussian_latents_measure_as_gaussian():
    d = 4 * 32 * 32
    for measure in gaussianity(noise(8, 4, 32, 32).float()):
        assert abs(measure["norm_ratio"] - 1) < 5 / (2 * d) ** 0.5
        assert abs(measure["mean"]) < 5 / d**0.5
        assert abs(measure["variance"] - 1) < 5 * (2 / d) ** 0.5
        assert abs(measure["autocorrelation"]) < 5 / (2 * d) ** 0.5
        assert abs(measure["kurtosis"]) < 5 * (24 / d) ** 0.5


def test_moments_are_those_of_scipy():
    z_CHW = noise(4, 8, 8) ** 3 * 2 + 5
    (measure,) = gaussianity(z_CHW[None])
    flat = z_CHW.flatten().numpy()
    assert measure["mean"] == pytest.approx(flat.mean())
    assert measure["variance"] == pytest.approx(flat.var())
    assert measure["kurtosis"] == pytest.approx(scipy.stats.kurtosis(flat))
    assert measure["norm_ratio"] == pytest.approx((flat**2).mean() ** 0.5)


def test_autocorrelation_is_the_mean_of_both_directions():
    """Rows that follow z_i = ρ·z_{i−1} + √(1−ρ²)·n, independent of each other: ρ across and 0 down."""
    rho, z_CHW = 0.8, noise(4, 128, 128)
    for x in range(1, 128):
        z_CHW[:, :, x] = rho * z_CHW[:, :, x - 1] + (1 - rho**2) ** 0.5 * z_CHW[:, :, x]
    assert gaussianity(z_CHW[None])[0]["autocorrelation"] == pytest.approx(rho / 2, abs=0.02)


def test_a_chessboard_is_perfectly_anticorrelated():
    board_HW = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    assert gaussianity(board_HW.expand(1, 4, 8, 8))[0]["autocorrelation"] == pytest.approx(-1)
