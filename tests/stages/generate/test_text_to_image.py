"""Text-to-image against diffusers' own pipeline, and row by row."""

import torch

from stages.contract import Order, Sampler
from stages.generate.text_to_image import TextToImage


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_images_are_those_of_the_diffusers_pipeline(load_tiny, models, tiny_pipeline):
    seeds_BCHW = noise(2, 4, 8, 8)
    theirs = tiny_pipeline(
        ["a cat"] * 2, latents=seeds_BCHW, num_inference_steps=6, guidance_scale=3.0, output_type="pt"
    ).images
    ours = TextToImage(TextToImage.Config(steps=6, guidance=3.0))(
        load_tiny(), models, Order("a cat", seeds_BCHW)
    ).image_B3hw
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.01


def test_images_are_clamped_and_carry_no_graph(gaussian_backbone, models):
    backbone = gaussian_backbone(mean=3.0)
    order = Order("star", noise(2, 4, 4, 4).double().requires_grad_())
    image_B3hw = TextToImage(TextToImage.Config())(backbone, models, order).image_B3hw
    assert image_B3hw.max() == 1
    assert not image_B3hw.requires_grad


def test_the_sampler_is_what_the_settings_say():
    assert TextToImage(TextToImage.Config(steps=7, guidance=2.5)).sampler() == Sampler(7, 2.5)


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    method = TextToImage(TextToImage.Config(steps=4))

    def drawn(*rows):
        return method(backbone, models, Order("a red star", torch.stack(rows))).image_B3hw

    first = drawn(row_CHW, *others)[0]
    other = drawn(*poisoned.flip(0), row_CHW)
    assert torch.equal(other[3], first)
    assert not torch.isfinite(other[1]).any()
