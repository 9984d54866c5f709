"""SGMS: its gradient in closed form, the size of its pushes, and what they do."""

import pytest
import torch

from stages.contract import Chance, Order
from stages.generate import sgms
from stages.generate.noise import row_noise
from stages.generate.sgms import Sgms, minority_gradient, posterior_variance
from stages.generate.text_to_image import TextToImage
from stages.sampling import condition
from tests.levels import at


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def order(backbone, *indices, prompt="a red star"):
    z_BCHW = noise(len(indices), *backbone.latent_shape).to(backbone.dtype)
    return Order(prompt, z_BCHW, chances=[Chance(i, ("test",)) for i in indices])


def drawn(backbone, models, order, **settings):
    return Sgms(Sgms.Config(**settings))(backbone, models, order)


def plain(backbone, models, order, steps):
    return TextToImage(TextToImage.Config(steps=steps))(backbone, models, order).image_B3hw


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_gradient_in_closed_form(gaussian_backbone, prediction_type):
    """x̂0 of Gaussian data is m + √ᾱ·d²/(ᾱd² + 1 − ᾱ)·(z − √ᾱ·m), with m where guidance moves it."""
    backbone, t, s = gaussian_backbone(prediction_type), 700, 800
    asked = condition(backbone, "a red star", 3.0, 2)
    z_BCHW, noise_BCHW = (noise(2, 4, 4, 4, seed=seed, dtype=torch.float64) for seed in (1, 2))
    mean = backbone.mean + 0.01 * 3.0 * len("a red star")

    def slope_and_x0(z, t):
        a = float(backbone.schedule.alphas_cumprod[t])
        slope = a**0.5 * backbone.deviation**2 / (a * backbone.deviation**2 + 1 - a)
        return slope, mean + slope * (z - a**0.5 * mean)

    slope, first = slope_and_x0(z_BCHW, t)
    a = float(backbone.schedule.alphas_cumprod[s])
    _, second = slope_and_x0(a**0.5 * first + (1 - a) ** 0.5 * noise_BCHW, s)
    distance_B, gradient_BCHW = minority_gradient(backbone, z_BCHW, t, asked, noise_BCHW, s)
    torch.testing.assert_close(distance_B, (first - second).square().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(gradient_BCHW, 2 * slope * (first - second))


def test_the_variance_is_that_of_ddpm():
    """β·(1 − ᾱ_{t−1})/(1 − ᾱ_t) for neighbouring timesteps; nothing is left to vary at ᾱ = 1."""
    assert posterior_variance(at(0.5 * 0.98), at(0.5)) == pytest.approx(0.02 * 0.5 / 0.51)
    assert posterior_variance(at(0.9), at(1.0)) == 0


def test_every_nth_step_is_pushed_by_its_variance(gaussian_backbone, models, monkeypatch):
    """Along g, and in each row by w·σ² at most, though DDIM's own σ is 0."""
    backbone, denoise, pushes = gaussian_backbone(), sgms.denoise, []

    def watched(backbone, z_BCHW, ask, sampler, *, correct):
        def seen(k, before, after):
            corrected = correct(k, before, after)
            pushes.append(corrected - after)
            return corrected

        return denoise(backbone, z_BCHW, ask, sampler, correct=seen)

    monkeypatch.setattr(sgms, "denoise", watched)
    what = order(backbone, 0, 1)
    traces = drawn(backbone, models, what, steps=5, every=2, scale=0.3).traces
    assert [len(trace) for trace in traces] == [3, 3]

    levels = [backbone.schedule.level(t) for t in (999, 799, 599, 399, 199, 0)]
    variances = [posterior_variance(levels[k], levels[k + 1]) for k in range(5)]
    assert variances[0] > 0.1
    expected = torch.tensor([0.3 * v * (k % 2 == 0) for k, v in enumerate(variances)]).double()
    largest_kB = torch.stack(pushes).abs().amax(dim=(2, 3, 4))
    torch.testing.assert_close(largest_kB, expected[:, None].expand(-1, 2))

    noise_BCHW = row_noise([chance.own() for chance in what.chances], what.z_BCHW)
    asked = condition(backbone, what.prompt, 4.0, 2)
    _, g_BCHW = minority_gradient(backbone, what.z_BCHW, 999, asked, noise_BCHW, 800)
    for push_CHW, g_CHW in zip(pushes[0], g_BCHW, strict=True):
        torch.testing.assert_close(push_CHW / expected[0], g_CHW / g_CHW.abs().max())


def test_scale_0_is_text_to_image_and_another_is_not(backbone, models):
    what = order(backbone, 0, 1)
    image_B3hw = plain(backbone, models, what, 2)
    assert torch.equal(drawn(backbone, models, what, steps=2, scale=0.0).image_B3hw, image_B3hw)
    pushed_B3hw = drawn(backbone, models, what, steps=2).image_B3hw
    assert ((pushed_B3hw - image_B3hw).abs().amax(dim=(1, 2, 3)) > 1e-5).all()


@pytest.mark.parametrize("t", [999, 599])
def test_guidance_raises_what_it_climbs(tangram, t):
    """In the mean of rows: x̂0(z_s) moves when z_t does, and g leaves that out."""
    asked, z_BCHW, noise_BCHW = (
        condition(tangram, "a red star", 4.0, 3),
        *(noise(3, *tangram.latent_shape, seed=seed) for seed in (1, 2)),
    )
    before_B, g_BCHW = minority_gradient(tangram, z_BCHW, t, asked, noise_BCHW, 800)
    pushed_BCHW = z_BCHW + 0.05 * g_BCHW / g_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
    after_B, _ = minority_gradient(tangram, pushed_BCHW, t, asked, noise_BCHW, 800)
    assert after_B.mean() > 1.05 * before_B.mean()


def test_where_there_is_nothing_to_climb_nothing_happens(gaussian_backbone, models):
    """A model for which everything is noise: x̂0 = 0 wherever z is, and g = 0, exactly at this ᾱ."""
    backbone = gaussian_backbone()
    backbone.schedule.alphas_cumprod = torch.full((1000,), 0.75, dtype=torch.float64)
    backbone.predict = lambda z_BCHW, t, text: z_BCHW / 0.5
    made = drawn(backbone, models, order(backbone, 0, 1), steps=4, every=1)
    assert made.traces == [[0.0] * 4] * 2
    assert torch.isfinite(made.image_B3hw).all()


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan

    def made(latents, indices):
        chances = [Chance(i, ("test",)) for i in indices]
        return drawn(
            backbone, models, Order("a cat", torch.stack(latents), chances=chances), steps=2, every=1
        )

    first = made([row_CHW, *others], [7, 1, 2, 3])
    other = made([*poisoned.flip(0), row_CHW], [3, 5, 6, 7])
    assert torch.equal(other.image_B3hw[3], first.image_B3hw[0])
    assert other.traces[3] == first.traces[0]
    assert not torch.equal(made([row_CHW, *others], [8, 1, 2, 3]).image_B3hw[0], first.image_B3hw[0])


def test_each_row_has_noise_of_its_own_stream():
    streams = [Chance(i, ("test",)).own() for i in (4, 5)]
    first, second = row_noise(streams, torch.zeros(2, 3)), row_noise(streams, torch.zeros(2, 3))
    alone = Chance(5, ("test",)).own().standard_normal((2, 3), dtype="float32")
    assert first[1].tolist() == alone[0].tolist()
    assert second[1].tolist() == alone[1].tolist()
    assert not torch.equal(first[0], first[1])
