"""A negative prompt in place of no words."""

import pytest
import torch

from pipeline.build import resolve
from pipeline.config import load
from schemas.errors import UserError
from stages.contract import Order
from stages.generate.null_prompt import NullPrompt
from stages.generate.text_to_image import TextToImage
from tests.small_build import make_config, noise_recipe


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_images_are_those_of_the_diffusers_pipeline(load_tiny, models, tiny_pipeline):
    seeds_BCHW = noise(2, 4, 8, 8)
    theirs = tiny_pipeline(
        ["a cat"] * 2, negative_prompt=["plain"] * 2, latents=seeds_BCHW, num_inference_steps=6,
        guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    settings = NullPrompt.Config(steps=6, guidance=3.0, negative="plain")
    ours = NullPrompt(settings)(load_tiny(), models, Order("a cat", seeds_BCHW)).image_B3hw
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-5)


def test_the_negative_prompt_pushes_away(gaussian_backbone, models):
    """Where a prompt shifts the mean by its length, a longer negative pulls the image down."""
    order = Order("star", noise(1, 4, 4, 4).double())
    backbone = gaussian_backbone(mean=0.0)

    def mean(negative):
        method = NullPrompt(NullPrompt.Config(steps=8, guidance=3.0, negative=negative))
        return float(method(backbone, models, order).image_B3hw.mean())

    without = TextToImage(TextToImage.Config(steps=8, guidance=3.0))(backbone, models, order)
    assert mean("commonly-looking") < mean("dull") < float(without.image_B3hw.mean())


def test_a_row_knows_neither_its_neighbours_nor_its_slot(load_tiny, models):
    backbone = load_tiny()
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    method = NullPrompt(NullPrompt.Config(steps=4, negative="dull"))

    def drawn(*rows):
        return method(backbone, models, Order("a red star", torch.stack(rows))).image_B3hw

    first = drawn(row_CHW, *others)[0]
    assert torch.equal(drawn(*poisoned.flip(0), row_CHW)[3], first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 1}, r"recipes\.plain\.generate\.guidance: 1 given, with which the negative prompt has"),
        ({"negative": ""}, r"recipes\.plain\.generate\.negative"),
        (
            {"negative": "red star " * 10},
            r"the negative prompt has 22 tokens, the backbone reads 20: shorten",
        ),
    ],
)
def test_a_plan_refuses_what_cannot_work(tmp_path, settings, message):
    recipe = noise_recipe(generate={"method": "null_prompt", "guidance": 4, "steps": 1} | settings)
    with pytest.raises(UserError, match=message) as caught:
        resolve(load(make_config(tmp_path, recipes={"plain": recipe})))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"negative": "red star " * 9}])
def test_a_plan_takes_the_defaults_and_the_longest_negative_prompt(tmp_path, settings):
    recipe = noise_recipe(generate={"method": "null_prompt"} | settings)
    streams = resolve(load(make_config(tmp_path, recipes={"plain": recipe})))[1].streams
    assert streams[0].recipe == "plain"
