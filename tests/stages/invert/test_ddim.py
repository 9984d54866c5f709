"""DDIM inversion against an exact solution, and as the sampler's way back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Sampler
from stages.gaussianity import gaussianity
from stages.invert.ddim import DdimInversion, invert_ddim
from stages.invert.measure import psnr
from stages.sampling import alphas, denoise, timesteps


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_seeds_converge_to_the_exact_flow_at_first_order(gaussian_backbone, prediction, spacing):
    backbone = gaussian_backbone(prediction, spacing)
    latents_BCHW = 0.7 + 0.4 * noise(3, 4, 4, 4, dtype=torch.float64)

    def error(steps):
        levels = alphas(backbone, timesteps(backbone, steps))
        exact = backbone.transport(latents_BCHW, levels[-1], levels[0], "star")
        return (invert_ddim(backbone, latents_BCHW, "star", Sampler(steps, 1.0)) - exact).norm().item()

    errors = [error(steps) for steps in (50, 100, 200)]
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - 1) < 0.2), (errors, orders)


def test_sampling_the_seeds_gives_the_image_back_the_better_the_more_steps(gaussian_backbone):
    latents_BCHW = 0.7 + 0.4 * noise(3, 4, 4, 4, dtype=torch.float64)

    def error(steps):
        sampler = Sampler(steps, 1.0)
        seeds_BCHW = invert_ddim(gaussian_backbone(), latents_BCHW, "star", sampler)
        return (denoise(gaussian_backbone(), seeds_BCHW, "star", sampler) - latents_BCHW).norm().item()

    errors = [error(steps) for steps in (10, 20, 40, 80, 160)]
    assert all(after < 0.65 * before for before, after in pairwise(errors)), errors


def test_the_same_on_a_network(load_tiny):
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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(1, 30))
def test_where_the_noise_does_not_depend_on_the_latent_the_way_back_is_exact(
    gaussian_backbone, guidance, seed, steps
):
    class Constant(gaussian_backbone):
        def predict(self, z_BCHW, t, text_BLD):
            return super().predict(torch.ones_like(z_BCHW), t, text_BLD)

    latents_BCHW = noise(2, 4, 4, 4, seed=seed, dtype=torch.float64)
    seeds_BCHW = invert_ddim(Constant(), latents_BCHW, "star", Sampler(steps, guidance))
    again_BCHW = denoise(Constant(), seeds_BCHW, "star", Sampler(steps, guidance))
    torch.testing.assert_close(again_BCHW, latents_BCHW, rtol=0, atol=1e-9)


def test_both_predictions_of_one_denoiser_give_one_seed(gaussian_backbone):
    latents_BCHW = noise(2, 4, 4, 4, dtype=torch.float64)
    seeds = [
        invert_ddim(gaussian_backbone(prediction), latents_BCHW, "star", Sampler(7, 2.0))
        for prediction in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*seeds, rtol=0, atol=1e-10)


def test_a_seed_is_measured(load_tiny):
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
def test_calls_count_what_a_row_went_through(gaussian_backbone, guidance, calls):
    backbone = gaussian_backbone()
    image_B3hw = noise(1, 3, 4, 4, dtype=torch.float64).clamp(-1, 1)
    method = DdimInversion(DdimInversion.Config(steps=7, guidance=guidance))
    (measures,) = method(backbone, image_B3hw, "star").measures
    assert measures["calls"] == calls
    # the way there and the measuring way back cost the same
    assert sum(backbone.batches) == 2 * calls


def test_psnr_of_known_errors():
    grey_B3hw = torch.zeros(3, 3, 4, 4)
    shifted_B3hw = grey_B3hw + torch.tensor([0.2, 2.0, 0.0])[:, None, None, None]  # 2.0 is clamped to white
    assert psnr(grey_B3hw, shifted_B3hw).tolist() == pytest.approx([20.0, 20 * np.log10(2), 100.0], rel=1e-5)


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone):
    side = backbone.image_size
    row_3hw, others = noise(3, side, side).clamp(-1, 1), noise(3, 3, side, side, seed=1).clamp(-1, 1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    method = DdimInversion(DdimInversion.Config(steps=4, guidance=2.0))
    first = method(backbone, torch.stack([row_3hw, *others]), "a red star")
    other = method(backbone, torch.stack([*poisoned.flip(0), row_3hw]), "a red star")
    assert torch.equal(other.z_BCHW[3], first.z_BCHW[0])
    assert other.measures[3] == first.measures[0]
    assert not torch.isfinite(other.z_BCHW[1]).any()
