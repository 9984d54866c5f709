"""What is recorded of an inversion, against numbers known beforehand."""

import numpy as np
import pytest
import torch

from stages.gaussianity import gaussianity
from stages.invert.measure import measured, psnr


def test_psnr_of_known_errors():
    grey_B3hw = torch.zeros(3, 3, 4, 4)
    shifted_B3hw = grey_B3hw + torch.tensor([0.2, 2.0, 0.0])[:, None, None, None]  # 2.0 is clamped to white
    assert psnr(grey_B3hw, shifted_B3hw).tolist() == pytest.approx([20.0, 20 * np.log10(2), 100.0], rel=1e-5)


@pytest.mark.parametrize("calls", [7, [3, 7]])
def test_each_row_has_its_own_measures(gaussian_backbone, noise, calls):
    backbone, image_B3hw = gaussian_backbone(), noise(2, 3, 4, 4).clamp(-0.9, 0.9)
    z0_BCHW, z_BCHW = backbone.encode(image_B3hw), noise(2, 4, 4, 4, seed=1)
    again_BCHW = z0_BCHW + torch.tensor([0.0, 0.1]).double()[:, None, None, None]
    first, second = measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls)
    assert (first["latent_mse"], first["psnr"]) == (0, 100)
    assert second["latent_mse"] == pytest.approx(0.01)
    assert second["psnr"] == pytest.approx(20 * np.log10(2 / 0.1), rel=1e-4)
    assert [first["calls"], second["calls"]] == (calls if isinstance(calls, list) else [calls, calls])
    for measure, gaussian in zip((first, second), gaussianity(z_BCHW), strict=True):
        assert {name: measure[name] for name in gaussian} == gaussian
