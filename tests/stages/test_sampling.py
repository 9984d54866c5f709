"""The denoising loop against diffusers, against an exact solution, and against itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import UserError
from stages.contract import Sampler
from stages.sampling import ddim_step, denoise, output_of, to_epsilon, to_x0
from stages.schedule import Level
from tests.levels import at

SCHEDULES = [
    {"prediction_type": prediction, "timestep_spacing": spacing}
    for prediction in ("epsilon", "v_prediction")
    for spacing in ("leading", "trailing")
]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 50, 333])
def test_timesteps_are_those_of_diffusers(tiny_pipeline, gaussian_backbone, spacing, steps):
    scheduler = type(tiny_pipeline.scheduler).from_config(
        tiny_pipeline.scheduler.config, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    assert list(gaussian_backbone(spacing=spacing).schedule.path(steps).times) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1001, 1000])
def test_too_few_or_too_many_steps_are_the_users_mistake(gaussian_backbone, steps):
    with pytest.raises(UserError, match=f"{steps} sampling steps given"):
        gaussian_backbone(spacing="leading").schedule.path(steps)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(s.values()))
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_denoise_is_the_diffusers_pipeline(load_tiny, tiny_pipeline, schedule, guidance):
    config = tiny_pipeline.scheduler.config
    pipeline = type(tiny_pipeline)(
        **{
            **tiny_pipeline.components,
            "scheduler": type(tiny_pipeline.scheduler).from_config(config, **schedule),
        },
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    seeds_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        ["a cat"] * 2,
        latents=seeds_BCHW,
        num_inference_steps=10,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    with torch.no_grad():
        ours = denoise(load_tiny(**schedule), seeds_BCHW, "a cat", Sampler(10, guidance))
    assert (ours - seeds_BCHW).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_sampling_converges_to_the_exact_flow_at_first_order(gaussian_backbone, prediction, spacing):
    backbone = gaussian_backbone(prediction, spacing)
    seeds_BCHW = torch.randn(3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def error(steps):
        levels = backbone.schedule.path(steps).levels
        exact = backbone.transport(seeds_BCHW, levels[0], levels[-1], "star")
        return (denoise(backbone, seeds_BCHW, "star", Sampler(steps, 1.0)) - exact).norm().item()

    errors = [error(steps) for steps in (50, 100, 200)]
    assert errors[0] < 0.3 * seeds_BCHW.norm()
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(orders - 1) < 0.2), (errors, orders)


def test_both_predictions_of_one_denoiser_draw_the_same(gaussian_backbone):
    seeds_BCHW = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = [
        denoise(gaussian_backbone(prediction), seeds_BCHW, "star", Sampler(12, 3.0))
        for prediction in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-10)


def test_guidance_costs_one_call_of_double_width_and_its_absence_one_of_single_width(gaussian_backbone):
    backbone = gaussian_backbone()
    z_BCHW = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    denoise(backbone, z_BCHW, "star", Sampler(2, 1.0))
    denoise(backbone, z_BCHW, "star", Sampler(2, 2.0))
    assert backbone.batches == [3, 3, 6, 6]


def test_guidance_extrapolates_from_the_empty_prompt(gaussian_backbone):
    """The Gaussian denoiser is affine in its mean, so guidance g acts as a prompt g times as long."""
    z_BCHW = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    guided = denoise(gaussian_backbone(), z_BCHW, "star", Sampler(9, 2.5))
    longer = denoise(gaussian_backbone(), z_BCHW, "star" * 2 + "rs", Sampler(9, 1.0))
    torch.testing.assert_close(guided, longer, rtol=0, atol=1e-12)


LEVELS = {
    "epsilon": at,
    "v_prediction": at,
    "flow": lambda sigma: Level(1 - sigma, sigma),
}


@pytest.mark.parametrize("prediction", LEVELS)
@given(number=st.floats(1e-3, 0.999), seed=st.integers(0, 99))
def test_conversions_split_a_latent_into_image_and_noise(prediction, number, seed):
    level = LEVELS[prediction](number)
    z, output = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x0, epsilon = to_x0(z, output, level, prediction), to_epsilon(z, output, level, prediction)
    torch.testing.assert_close(level.signal * x0 + level.noise * epsilon, z)
    torch.testing.assert_close(output_of(x0, epsilon, level, prediction), output)
    torch.testing.assert_close(ddim_step(z, output, level, level, prediction), z)
    torch.testing.assert_close(ddim_step(z, output, level, Level(1.0, 0.0), prediction), x0)


def test_callback_sees_the_latents_after_each_step(gaussian_backbone):
    seen = []
    z_BCHW = torch.ones(1, 4, 4, 4, dtype=torch.float64)
    end = denoise(
        gaussian_backbone(), z_BCHW, "", Sampler(5, 1.0), callback=lambda k, z: seen.append((k, z.clone()))
    )
    assert [k for k, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], end)
    assert len({float(z.sum()) for _, z in seen}) == 5
