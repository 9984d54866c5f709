"""O-BELM: exact under its own sampler, of second order, and what DDIM makes of its seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Sampler
from stages.invert.belm import Belm, denoise_belm, invert_belm
from stages.invert.ddim import invert_ddim
from stages.sampling import condition, ddim_step, denoise, predict_guided


def rms(z_BCHW):
    return float(z_BCHW.double().square().mean().sqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 30), guidance=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 99))
def test_its_own_sampler_draws_the_latent_back_from_both_states(
    gaussian_backbone, noise, prediction, steps, guidance, seed
):
    backbone, sampler = gaussian_backbone(prediction), Sampler(steps, guidance)
    z0_BCHW = noise(2, 4, 4, 4, seed=seed, dtype=torch.float64)
    states = invert_belm(backbone, z0_BCHW, "star", sampler)
    torch.testing.assert_close(denoise_belm(backbone, *states, "star", sampler), z0_BCHW, rtol=0, atol=1e-9)


def test_also_where_the_schedule_begins_in_pure_noise(pure_noise_backbone, noise):
    backbone, z0_BCHW = pure_noise_backbone(), noise(2, 4, 4, 4, dtype=torch.float64)
    states = invert_belm(backbone, z0_BCHW, "star", Sampler(10, 1.0))
    again_BCHW = denoise_belm(backbone, *states, "star", Sampler(10, 1.0))
    torch.testing.assert_close(again_BCHW, z0_BCHW, rtol=0, atol=1e-9)


def test_on_a_network_the_second_state_is_what_makes_it_exact(load_tiny, noise):
    backbone, sampler = load_tiny(prediction_type="v_prediction"), Sampler(10, 1.0)
    path = backbone.schedule.path(10)
    with torch.no_grad():
        z0_BCHW = backbone.encode(noise(2, 3, 16, 16).clamp(-1, 1))
        z_BCHW, second_BCHW = invert_belm(backbone, z0_BCHW, "a cat", sampler)
        both = rms(denoise_belm(backbone, z_BCHW, second_BCHW, "a cat", sampler) - z0_BCHW)
        output_BCHW = predict_guided(
            backbone, z_BCHW, path.times[0], condition(backbone, "a cat", 1.0, len(z_BCHW))
        )
        guess_BCHW = ddim_step(z_BCHW, output_BCHW, path.levels[0], path.levels[1], "v_prediction")
        one = rms(denoise_belm(backbone, z_BCHW, guess_BCHW, "a cat", sampler) - z0_BCHW)
    assert both < 1e-4
    assert one > 100 * both


def test_seeds_converge_to_the_exact_flow_at_second_order_and_ddims_at_first(gaussian_backbone, noise):
    backbone = gaussian_backbone()
    z0_BCHW = 0.7 + 0.4 * noise(3, 4, 4, 4, dtype=torch.float64)

    def errors(invert):
        for steps in (50, 100, 500):
            levels = backbone.schedule.path(steps).levels
            exact_BCHW = backbone.transport(z0_BCHW, levels[-1], levels[0], "star")
            yield rms(invert(backbone, z0_BCHW, "star", Sampler(steps, 1.0)) - exact_BCHW)

    # The first step shrinks more slowly than the others: φ grows as √t there.
    belm, ddim = (np.array([*errors(invert)]) for invert in (lambda *a: invert_belm(*a)[0], invert_ddim))
    assert np.all(belm < ddim / 2)
    assert belm[0] / belm[-1] > 10**1.8
    assert ddim[0] / ddim[-1] < 10**1.2


def test_both_errors_are_reported(load_tiny, noise):
    backbone, image_B3hw = load_tiny(prediction_type="v_prediction"), noise(2, 3, 16, 16).clamp(-1, 1)
    inverted = Belm(Belm.Config(steps=10))(backbone, image_B3hw, "a cat")
    assert inverted.z_BCHW.dtype == torch.float32
    with torch.no_grad():
        again_BCHW = denoise(backbone, inverted.z_BCHW, "a cat", Sampler(10, 1.0))
        errors_B = (again_BCHW - backbone.encode(image_B3hw)).square().mean(dim=(1, 2, 3))
    for measure, error in zip(inverted.measures, errors_B.tolist(), strict=True):
        assert measure["latent_mse"] == pytest.approx(error, rel=1e-5)
        assert measure["belm_mse"] < 1e-6 * error
        assert measure["calls"] == 10
