"""pix2pix-zero's regularisation: what its losses measure, and what it does to noise and to seeds."""

import numpy as np
import pytest
import torch

from stages.contract import Sampler
from stages.gaussianity import gaussianity
from stages.invert.ddim import DdimInversion, invert_ddim
from stages.invert.regularized import (
    RegularizedInversion,
    invert_regularized,
    kl_loss,
    pair_loss,
    regularize,
)


def coloured(noise, *shape):
    """Correlated noise of the wrong size: white noise blurred, 0.7 times as large, shifted by 0.2."""
    z_BCHW = noise(*shape, dtype=torch.float64)
    z_BCHW = z_BCHW + 0.5 * z_BCHW.roll(1, 2) + 0.5 * z_BCHW.roll(1, 3)
    return 0.7 * z_BCHW / 1.5**0.5 + 0.2


def test_pair_loss_of_known_pictures():
    flat_BCHW = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)
    chess_HW = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double().tile(8, 8)
    chess_BCHW = chess_HW.expand(1, 3, 16, 16)
    assert pair_loss(flat_BCHW).item() == pytest.approx(3 * 2 * 2 * 0.5**4)  # channels, axes, levels
    assert pair_loss(chess_BCHW).item() == pytest.approx(3 * 2)  # averaged away on the second level
    both_BCHW = torch.cat([flat_BCHW, chess_BCHW])
    assert pair_loss(both_BCHW).tolist() == pytest.approx([1.5 * 0.5, 6.0])


def test_kl_loss_is_the_divergence_from_the_standard_normal(noise):
    z_BCHW = noise(1, 4, 32, 32, dtype=torch.float64)
    z_BCHW = (z_BCHW - z_BCHW.mean()) / z_BCHW.std()
    assert kl_loss(z_BCHW).item() == pytest.approx(0, abs=1e-6)
    assert kl_loss(0.5 * z_BCHW + 0.3).item() == pytest.approx(0.25 + 0.09 - 1 - np.log(0.25), rel=1e-6)


def test_coloured_noise_is_whitened_and_white_noise_is_left_alone(noise):
    z_BCHW, white_BCHW = coloured(noise, 2, 4, 16, 16), noise(2, 4, 16, 16, dtype=torch.float64)
    after_BCHW = regularize(z_BCHW, 20.0, 20.0, 20)
    assert (pair_loss(after_BCHW) < 0.5 * pair_loss(z_BCHW)).all()
    assert (kl_loss(after_BCHW) < 0.5 * kl_loss(z_BCHW)).all()
    assert all(
        abs(after["autocorrelation"]) < 0.7 * abs(before["autocorrelation"])
        for before, after in zip(gaussianity(z_BCHW), gaussianity(after_BCHW), strict=True)
    )
    change = (regularize(white_BCHW, 20.0, 20.0, 20) - white_BCHW).norm() / white_BCHW.norm()
    assert change < 0.3 * (after_BCHW - z_BCHW).norm() / z_BCHW.norm()


def test_without_weights_it_is_ddim_inversion(gaussian_backbone, noise):
    z0_BCHW = noise(2, 4, 4, 4, dtype=torch.float64)
    seeds_BCHW = invert_regularized(gaussian_backbone(), z0_BCHW, "star", Sampler(6, 2.0), 0.0, 0.0, 3)
    assert torch.equal(seeds_BCHW, invert_ddim(gaussian_backbone(), z0_BCHW, "star", Sampler(6, 2.0)))


def test_seeds_are_more_typical_and_draw_the_image_less(gaussian_backbone, noise):
    """Images with a tenth of the contrast that the model knows have seeds a tenth as long."""
    backbone = gaussian_backbone()
    image_B3hw = backbone.mean + 0.1 * backbone.deviation * noise(3, 3, 4, 4)
    config = {"steps": 20, "autocorrelation": 0.5, "kl": 0.5}
    plain = DdimInversion(DdimInversion.Config(steps=20))(backbone, image_B3hw, "").measures
    regular = RegularizedInversion(RegularizedInversion.Config(**config))(backbone, image_B3hw, "").measures
    for before, after in zip(plain, regular, strict=True):
        assert abs(after["norm_ratio"] - 1) < 0.5 * abs(before["norm_ratio"] - 1)
        assert after["latent_mse"] > 10 * before["latent_mse"]
        assert after["calls"] == before["calls"] == 20
