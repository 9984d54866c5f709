"""Fixed-point inversion: an exact inverse of the sampler, row by row, and its noise to start from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Sampler
from stages.invert.ddim import invert_ddim
from stages.invert.fixed_point import FixedPoint, fixed_point, invert_fixed_point, noise_of
from stages.sampling import denoise


def rms(z_BCHW):
    return float(z_BCHW.double().square().mean().sqrt())


@settings(deadline=None)
@given(slope=st.floats(-3, 0.95), seed=st.integers(0, 99))
def test_where_all_errors_shrink_alike_three_values_suffice_even_when_they_grow(noise, slope, seed):
    z_BCHW, fixed_BCHW = noise(2, 1, 2, 3, 3, seed=seed, dtype=torch.float64)
    answer_BCHW, asked_B = fixed_point(lambda z: fixed_BCHW + slope * (z - fixed_BCHW), z_BCHW, 10, 1e-9)
    torch.testing.assert_close(answer_BCHW, fixed_BCHW, rtol=0, atol=1e-7)
    assert asked_B.tolist() == [3] or abs(slope) < 1e-9


@settings(deadline=None)
@given(seed=st.integers(0, 99))
def test_a_contraction_is_solved_to_the_tolerance(noise, seed):
    slopes_CHW = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(seed)).double() * 1.6 - 0.8
    z_BCHW, fixed_BCHW = noise(2, 4, 2, 3, 3, seed=seed, dtype=torch.float64)
    answer_BCHW, asked_B = fixed_point(
        lambda z: fixed_BCHW + slopes_CHW * (z - fixed_BCHW), z_BCHW, 200, 1e-6
    )
    assert (answer_BCHW - fixed_BCHW).square().mean(dim=(1, 2, 3)).sqrt().max() < 1e-6 / (1 - 0.8)
    assert asked_B.max() < 60


def scripted(values):
    """A function that returns what it is told to, whatever it is asked."""
    told = iter(values)
    return lambda z: torch.full_like(z, next(told))


def test_a_row_ends_with_the_best_that_is_known():
    start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    # Changes of 1 and 0.1, then of 4.9: nothing is nearer than the iterate that changed by 0.1.
    assert fixed_point(scripted([1.0, 1.1, 6.0]), start, 3, 1e-6)[0].item() == 1.0
    # Without the third value nothing speaks against the next iterate, at 1.1 + 0.1/9.
    assert fixed_point(scripted([1.0, 1.1]), start, 2, 1e-6)[0].item() == pytest.approx(1.1 + 0.1 / 9)
    # A first value alone is taken on trust, as DDIM inversion does.
    assert fixed_point(scripted([1.0]), start, 1, 1e-6)[0].item() == 1.0
    # What is not finite ends a row: with what was best, and openly when nothing was.
    assert fixed_point(scripted([1.0, 1.1, torch.inf]), start, 9, 1e-6)[0].item() == 1.0
    assert not fixed_point(scripted([torch.nan]), start, 9, 1e-6)[0].isfinite()


def test_a_solved_row_keeps_its_value_while_others_go_on(noise):
    slopes_B111 = torch.tensor([0.0, 0.5, 0.9]).double()[:, None, None, None]
    wobble_CHW = 0.05 * noise(1, 4, 4, seed=1, dtype=torch.float64).tanh()
    z_BCHW = noise(3, 1, 4, 4, dtype=torch.float64)

    def f(slopes_B111):
        return lambda z: slopes_B111 * z + wobble_CHW * z.sin()

    together_BCHW, asked_B = fixed_point(f(slopes_B111), z_BCHW, 50, 1e-6)
    alone = [fixed_point(f(slopes_B111[[b]]), z_BCHW[[b]], 50, 1e-6) for b in range(3)]
    assert torch.equal(together_BCHW, torch.cat([answer for answer, _ in alone]))
    assert asked_B.tolist() == [int(asked) for _, asked in alone]
    assert len(set(asked_B.tolist())) == 3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@settings(max_examples=20, deadline=None)
@given(steps=st.integers(1, 30), guidance=st.sampled_from([1.0, 2.0]), seed=st.integers(0, 99))
def test_the_sampler_draws_the_latent_back_however_few_its_steps(
    gaussian_backbone, noise, prediction, steps, guidance, seed
):
    backbone, sampler = gaussian_backbone(prediction), Sampler(steps, guidance)
    z0_BCHW = noise(2, 4, 4, 4, seed=seed, dtype=torch.float64)
    z_BCHW, _ = invert_fixed_point(backbone, z0_BCHW, "star", sampler, 100, 1e-13)
    torch.testing.assert_close(denoise(backbone, z_BCHW, "star", sampler), z0_BCHW, rtol=0, atol=1e-9)


def test_also_where_the_schedule_begins_in_pure_noise(pure_noise_backbone, noise):
    backbone, z0_BCHW = pure_noise_backbone(), noise(2, 4, 4, 4, dtype=torch.float64)
    assert backbone.schedule.path(10).levels[0].signal == 0
    z_BCHW, _ = invert_fixed_point(backbone, z0_BCHW, "star", Sampler(10, 1.0), 100, 1e-13)
    again_BCHW = denoise(backbone, z_BCHW, "star", Sampler(10, 1.0))
    torch.testing.assert_close(again_BCHW, z0_BCHW, rtol=0, atol=1e-9)


def test_exact_seeds_converge_to_the_exact_flow_at_the_order_of_the_sampler(gaussian_backbone, noise):
    backbone = gaussian_backbone("v_prediction")
    z0_BCHW = 0.7 + 0.4 * noise(3, 4, 4, 4, dtype=torch.float64)

    def error(steps):
        levels = backbone.schedule.path(steps).levels
        exact_BCHW = backbone.transport(z0_BCHW, levels[-1], levels[0], "star")
        return rms(
            invert_fixed_point(backbone, z0_BCHW, "star", Sampler(steps, 1.0), 50, 1e-10)[0] - exact_BCHW
        )

    orders = -np.diff(np.log2([error(steps) for steps in (50, 100, 200)]))
    assert np.all(np.abs(orders - 1) < 0.2), orders


def test_on_a_trained_model_it_is_far_better_than_ddim_for_as_many_calls(tangram, noise):
    """The latents are the model's own, so that a typical seed exists: the one they were drawn from."""
    sampler = Sampler(10, 1.0)
    with torch.no_grad():
        seeds_BCHW = noise(2, *tangram.latent_shape)
        z0_BCHW = denoise(tangram, seeds_BCHW, "a photo of a circle", sampler)

        def errors(z_BCHW, sampler):
            again_BCHW = denoise(tangram, z_BCHW, "a photo of a circle", sampler)
            return rms(again_BCHW - z0_BCHW), rms(z_BCHW - seeds_BCHW)

        z_BCHW, calls_B = invert_fixed_point(tangram, z0_BCHW, "a photo of a circle", sampler, 20, 1e-4)
        exact, found = errors(z_BCHW, sampler)
        slow = Sampler(int(calls_B.max()), 1.0)
        naive, _ = errors(invert_ddim(tangram, z0_BCHW, "a photo of a circle", slow), slow)
    assert exact < naive / 10
    assert found < 0.05  # of 1: the seed itself, nearly


def test_a_tighter_tolerance_costs_calls_and_buys_exactness(load_tiny, noise):
    backbone, sampler = load_tiny(prediction_type="v_prediction"), Sampler(8, 1.0)
    with torch.no_grad():
        z0_BCHW = backbone.encode(noise(2, 3, 16, 16).clamp(-1, 1))
        results = []
        for tolerance in (1e-2, 1e-3, 1e-4):
            z_BCHW, calls_B = invert_fixed_point(backbone, z0_BCHW, "a cat", sampler, 50, tolerance)
            results.append((rms(denoise(backbone, z_BCHW, "a cat", sampler) - z0_BCHW), int(calls_B.sum())))
    errors, calls = zip(*results, strict=True)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert calls[0] < calls[1] < calls[2]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_calls_are_those_of_the_row(gaussian_backbone, guidance):
    backbone = gaussian_backbone()
    image_B3hw = torch.linspace(-1, 1, 48, dtype=torch.float32).view(1, 3, 4, 4)
    method = FixedPoint(FixedPoint.Config(steps=5, guidance=guidance, iterations=4, tolerance=1e-9))
    (measure,) = method(backbone, image_B3hw, "star").measures
    assert measure["calls"] == sum(backbone.batches[:-5])  # the last five drew the image again


def test_noise_derives_from_the_image_alone(noise):
    image_B3hw, z0_BCHW = noise(3, 3, 16, 16), torch.zeros(3, 4, 32, 32)
    image_B3hw[2] = image_B3hw[0]
    noise_BCHW = noise_of(image_B3hw, z0_BCHW)
    assert torch.equal(noise_BCHW[0], noise_BCHW[2])
    assert torch.equal(noise_of(image_B3hw[[1]], z0_BCHW[[1]])[0], noise_BCHW[1])
    first, second = noise_BCHW[0].flatten(), noise_BCHW[1].flatten()
    assert abs(float((first * second).mean())) < 5 / 4096**0.5
    normal = np.sort(torch.special.ndtr(first.double()).numpy())
    assert np.abs(normal - (np.arange(4096) + 0.5) / 4096).max() < 1.63 / 4096**0.5  # KS at 1 %


def test_a_start_noise_is_inverted_with_the_latent_and_measured_as_an_error(gaussian_backbone, noise):
    backbone, image_B3hw = gaussian_backbone(), noise(2, 3, 4, 4).clamp(-1, 1)
    settings = {"steps": 6, "iterations": 50, "tolerance": 1e-12}
    inverted = FixedPoint(FixedPoint.Config(**settings, start_noise=0.1))(backbone, image_B3hw, "star")
    z0_BCHW = backbone.encode(image_B3hw)
    noise_BCHW = 0.1 * noise_of(image_B3hw, z0_BCHW)
    again_BCHW = denoise(backbone, inverted.z_BCHW, "star", Sampler(6, 1.0))
    torch.testing.assert_close(again_BCHW, z0_BCHW + noise_BCHW, rtol=0, atol=1e-9)
    errors_B = noise_BCHW.square().mean(dim=(1, 2, 3))
    assert [m["latent_mse"] for m in inverted.measures] == pytest.approx(errors_B.tolist(), rel=1e-6)
