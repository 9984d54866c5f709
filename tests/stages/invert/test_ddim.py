"""DDIM inversion against an exact solution, and as the sampler's way back."""

import numpy as np
import pytest
import torch

from stages.contract import Sampler
from stages.gaussianity import gaussianity
from stages.invert.ddim import DdimInversion, invert_ddim
from stages.sampling import denoise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_seeds_converge_to_the_exact_flow_at_first_order(gaussian_backbone, prediction, spacing, noise):
    backbone = gaussian_backbone(prediction, spacing)
    latents_BCHW = 0.7 + 0.4 * noise(3, 4, 4, 4, dtype=torch.float64)

    def error(steps):
        levels = backbone.schedule.path(steps).levels
        exact = backbone.transport(latents_BCHW, levels[-1], levels[0], "star")
        return (invert_ddim(backbone, latents_BCHW, "star", Sampler(steps, 1.0)) - exact).norm().item()

    errors = [error(steps) for steps in (50, 100, 200)]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - 1) < 0.2), (errors, orders)


def test_on_a_network_more_steps_give_the_image_back_better(load_tiny, noise):
    """An untrained ε-network is too rough a field for so few steps; as a v-network it is smooth enough."""
    backbone = load_tiny(prediction_type="v_prediction")

    def error(steps):
        with torch.no_grad():
            latents_BCHW = backbone.encode(noise(2, 3, 16, 16).clamp(-1, 1))
            seeds_BCHW = invert_ddim(backbone, latents_BCHW, "a cat", Sampler(steps, 1.0))
            again_BCHW = denoise(backbone, seeds_BCHW, "a cat", Sampler(steps, 1.0))
        return ((again_BCHW - latents_BCHW).norm() / latents_BCHW.norm()).item()

    errors = [error(steps) for steps in (10, 30, 90)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert errors[2] < 0.1


def test_a_seed_is_measured(load_tiny, noise):
    backbone, image_B3hw = load_tiny(), noise(2, 3, 16, 16).clamp(-1, 1)
    inverted = DdimInversion(DdimInversion.Config(steps=10))(backbone, image_B3hw, "a cat")
    with torch.no_grad():
        again_BCHW = denoise(backbone, inverted.z_BCHW, "a cat", Sampler(10, 1.0))
        again_B3hw, latents_BCHW = backbone.decode(again_BCHW), backbone.encode(image_B3hw)
    for row, measure in enumerate(inverted.measures):
        (gaussian,) = gaussianity(inverted.z_BCHW[row : row + 1])
        error = ((image_B3hw[row].clamp(-1, 1) - again_B3hw[row].clamp(-1, 1)) / 2).square().mean()
        expected = {
            **gaussian,
            "psnr": float(-10 * torch.log10(error)),
            "latent_mse": float((again_BCHW[row] - latents_BCHW[row]).square().mean()),
            "calls": 10,
        }
        assert measure == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 7), (2.0, 14)])
def test_calls_count_what_a_row_went_through(gaussian_backbone, guidance, calls, noise):
    backbone = gaussian_backbone()
    image_B3hw = noise(1, 3, 4, 4, dtype=torch.float64).clamp(-1, 1)
    method = DdimInversion(DdimInversion.Config(steps=7, guidance=guidance))
    (measures,) = method(backbone, image_B3hw, "star").measures
    assert measures["calls"] == calls
    # the way there and the measuring way back cost the same
    assert sum(backbone.batches) == 2 * calls
