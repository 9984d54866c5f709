"""Textual inversion: only the word is learned, it fits its references better, and methods share it.

Shape letters: N references, C H W latent, h w image, D text width.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from jobs.tangram.drawings import draw, generator
from schemas.errors import UserError
from stages import images
from stages.backbones.diffusion.load import BackboneFacts
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import Chance, Material, Order, Text
from stages.generate.da_fusion import DaFusion
from stages.generate.genie import Genie
from stages.generate.text_to_image import TextToImage
from stages.generate.textual_inversion import (
    WORD,
    TextualInversion,
    TokenSettings,
    learn_token,
    token_loss,
    with_token,
)
from stages.sampling import add_noise, to_epsilon

SHORT = {"templates": ("a {token}", "{token} x"), "start": None}  # the tiny model reads twelve tokens


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawings(shape, count):
    return torch.stack(
        [images.to_tensor(draw(shape, generator("references", shape, i))[0], 64) for i in range(count)]
    )


def pictures(backbone, count=2):
    return noise(count, 3, backbone.image_size, backbone.image_size, seed=5).tanh()


def mean_loss(backbone, image_N3hw, word_D, examples=12):
    """Over a fixed set of noise and timesteps, spread evenly."""
    with torch.no_grad():
        text = backbone.embed_words("a {token}", {WORD: word_D[None]})
        z0 = [backbone.encode(image[None]) for image in image_N3hw]
        losses = [
            token_loss(backbone, z0[k % len(z0)], noise(1, *backbone.latent_shape, seed=k), 40 + 80 * k, text)
            for k in range(examples)
        ]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_nothing_but_the_word_changes(load_tiny, kind):
    backbone = load_tiny(prediction_type=kind)
    parts = (backbone._encoders[0].model, backbone.denoiser, backbone.vae)
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    start = backbone.word(None)
    word, losses = learn_token(
        backbone, pictures(backbone), TokenSettings(steps=3, **SHORT), np.random.default_rng(0)
    )
    assert not torch.equal(word, start)
    assert losses.shape == (3,)
    for part, weights in zip(parts, before, strict=True):
        assert part.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in part.state_dict().items())
        assert all(weight.grad is None for weight in part.parameters())


def test_its_gradient_is_that_of_a_new_row_of_the_table(load_tiny):
    """As the authors learn it: a token is added to the vocabulary, and a row to the embedding table."""
    backbone, word = load_tiny(), noise(16, seed=3) * 0.1
    z0, n, t = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), 300
    ours = word.clone().requires_grad_()
    token_loss(backbone, z0, n, t, backbone.embed_words("a {token}", {WORD: ours[None]})).backward()

    tokenizer = copy.deepcopy(backbone._encoders[0].tokenizer)
    tokenizer.add_tokens("<new>")
    encoder = copy.deepcopy(backbone._encoders[0].model)
    encoder.resize_token_embeddings(len(tokenizer))
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = word
    table.requires_grad_()
    tokens = tokenizer("a <new>", padding="max_length", max_length=12, return_tensors="pt").input_ids
    token_loss(backbone, z0, n, t, Text(encoder(tokens)[0])).backward()
    assert ours.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, table.grad[-1], rtol=1e-4, atol=1e-8)
    assert table.grad[:-1].abs().max() > 0  # theirs reaches the words beside it, and is thrown away


def test_the_loss_of_v_is_that_of_epsilon_over_its_noise_level(gaussian_backbone):
    z0, n = noise(1, 4, 4, 4).double(), noise(1, 4, 4, 4, seed=1).double()
    for t in (10, 400, 950):
        losses = {}
        for kind in ("epsilon", "v_prediction"):
            backbone = gaussian_backbone(kind)
            losses[kind] = float(token_loss(backbone, z0, n, t, backbone.embed(["a fox"])))
            alpha = float(backbone.schedule.alphas_cumprod[t])
            level = backbone.schedule.level(t)
            z = add_noise(z0, n, level)
            output = backbone.predict(z, t, backbone.embed(["a fox"]))
            error = (to_epsilon(z, output, level, kind) - n).square().mean()
            assert losses[kind] == pytest.approx(float(error) / (1 if kind == "epsilon" else alpha))
        assert losses["v_prediction"] == pytest.approx(losses["epsilon"] / alpha)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_word_finds_what_the_references_show(gaussian_backbone, kind):
    """This model's word shifts the mean of its data by 0.01 of it, so references of another mean call for
    a word that is known."""
    backbone = gaussian_backbone(kind)
    template = "a {token}"
    wanted = 30.0
    image = torch.full((1, 3, 4, 4), backbone.mean + 0.01 * (len(template) + wanted), dtype=torch.float64)
    settings = TokenSettings(start=None, templates=(template,), steps=120, lr=1.0, weight_decay=0, batch=2)
    word, _ = learn_token(backbone, image, settings, np.random.default_rng(0))
    assert float(word) == pytest.approx(wanted, abs=4)


def test_a_model_in_half_precision_learns_from_small_errors(gaussian_backbone):
    """Its output and the gradient there have 16 bits, and a mean over 16384 values is below their least."""

    class Half(gaussian_backbone):
        latent_shape, image_size = (4, 64, 64), 64

        def predict(self, z_BCHW, t, text):
            return super().predict(z_BCHW, t, text).half().to(z_BCHW)

    backbone, wanted = Half(deviation=0.001), 0.1
    backbone.schedule.alphas_cumprod = backbone.schedule.alphas_cumprod[500:]
    image = torch.full((1, 3, 64, 64), backbone.mean + 0.01 * (len("a {token}") + wanted))
    settings = TokenSettings(start=None, templates=("a {token}",), steps=30, lr=0.01, batch=16)
    word, _ = learn_token(backbone, image.double(), settings, np.random.default_rng(0))
    assert float(word) == pytest.approx(wanted, abs=0.04)


def test_decay_acts_on_the_word_as_published(gaussian_backbone):
    """Decoupled: after one step two learnings differ by lr·decay·v."""
    backbone = gaussian_backbone()
    words = [
        learn_token(
            backbone,
            torch.zeros(1, 3, 4, 4, dtype=torch.float64),
            TokenSettings(start="fox", steps=1, lr=0.1, weight_decay=decay),
            np.random.default_rng(0),
        )[0]
        for decay in (0, 0.5)
    ]
    torch.testing.assert_close(words[0] - words[1], 0.1 * 0.5 * backbone.word("fox"))


def test_mirroring_shows_both_sides(gaussian_backbone):
    class Seen(gaussian_backbone):
        def __init__(self):
            super().__init__()
            self.sides = []

        def predict(self, z_BCHW, t, text):
            self.sides.append(float((z_BCHW[..., :2] - z_BCHW[..., 2:]).mean()))
            return super().predict(z_BCHW, t, text)

    image = torch.cat([torch.full((1, 3, 4, 2), 50.0), torch.full((1, 3, 4, 2), -50.0)], dim=3)
    shares = {}
    for flip in (0, 0.5, 1):
        backbone = Seen()
        settings = TokenSettings(start=None, steps=50, batch=4, flip=flip)
        learn_token(backbone, image, settings, np.random.default_rng(0))
        shares[flip] = np.mean(np.array(backbone.sides) < 0)
    assert (shares[0], shares[1]) == (0, 1)
    assert shares[0.5] == pytest.approx(0.5, abs=0.15)  # four deviations of 200 draws


def test_the_loss_on_fixed_noise_falls(load_tiny):
    backbone = load_tiny()
    image = pictures(backbone)
    settings = TokenSettings(steps=15, lr=0.03, **SHORT)
    word, _ = learn_token(backbone, image, settings, np.random.default_rng(0))
    # this model is untrained and hears little of its prompt
    assert mean_loss(backbone, image, word) < mean_loss(backbone, image, backbone.word(None)) - 3e-4


def test_the_same_randomness_learns_the_same_word(load_tiny, models):
    backbone = load_tiny()

    def learned(seed, settings):
        material = Material(pictures(backbone), "fox", "a fox", Chance(0, ("artifact", seed)))
        return TextualInversion(TextualInversion.Config(token=settings)).prepare(backbone, models, material)

    settings = TokenSettings(steps=2, **SHORT)
    first, again, other = (learned(seed, settings) for seed in ("a", "a", "b"))
    assert first.keys() == {"word_D", "losses_S"}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["word_D"], other["word_D"])


@pytest.fixture(scope="module")
def octagon(tangram):
    """A rare class's references and the word learned from them, in few steps of a larger rate."""
    image = drawings("octagon", 8)
    settings = TokenSettings(steps=40, lr=0.03)
    return image, learn_token(tangram, image, settings, np.random.default_rng(0))[0]


def test_images_of_the_word_are_nearer_to_the_references_than_those_of_its_start(tangram, models, octagon):
    """n = 8 images each, of the same seeds; cosine with the references' mean in CLIP."""
    image, word = octagon
    method = TextualInversion(TextualInversion.Config(steps=8, guidance=4.0))
    clip = models.clip("tangram")
    z = noise(8, *tangram.latent_shape)
    nearness = {}
    with torch.no_grad():
        centre = F.normalize(clip.encode_image(image).mean(dim=0), dim=0)
        for name, vector in {"start": tangram.word("the"), "learned": word}.items():
            order = Order("a photo of a octagon", z, target="octagon", artifact={"word_D": vector})
            made = method(tangram, models, order).image_B3hw
            nearness[name] = float(F.cosine_similarity(clip.encode_image(made), centre[None]).mean())
    assert nearness["learned"] > nearness["start"] + 0.3
    assert mean_loss(tangram, image, word) < mean_loss(tangram, image, tangram.word("the"))


def test_a_known_word_given_as_the_learned_one_draws_the_same_images(tangram, models):
    z = noise(2, *tangram.latent_shape)
    order = Order("a photo of a gear", z, target="gear", artifact={"word_D": tangram.word("gear")})
    settings = {"steps": 3, "guidance": 3.0}
    made = TextualInversion(TextualInversion.Config(**settings))(tangram, models, order)
    plain = TextToImage(TextToImage.Config(**settings))(tangram, models, order)
    torch.testing.assert_close(made.image_B3hw, plain.image_B3hw, rtol=0, atol=1e-4)
    assert made.prompts == ["a photo of a <token>"] * 2


def test_genie_draws_the_source_as_the_learned_word(tangram, models, octagon):
    source = drawings("square", 2)
    order = Order(
        "a photo of a octagon", noise(2, *tangram.latent_shape), target="octagon",
        source_B3hw=source, artifact={"word_D": octagon[1]},
    )  # fmt: skip
    settings = {"steps": 8, "ratio": 0.9, "guidance": 4.0}
    made = Genie(Genie.Config(token={}, **settings))(tangram, models, order)
    plain = Genie(Genie.Config(**settings))(tangram, models, order)
    assert (made.prompts, plain.prompts) == (["a photo of a <token>"] * 2, ["a photo of a octagon"] * 2)
    assert not torch.equal(made.image_B3hw, plain.image_B3hw)
    assert Genie(Genie.Config()).prepared() is None


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    z = noise(3, *backbone.latent_shape)
    method = TextualInversion(TextualInversion.Config(steps=4, guidance=2.0))
    word = backbone.word(None)

    def drawn(rows, poison):
        seeds = z[rows].clone()
        seeds[poison] = torch.nan
        order = Order("a x", seeds, target="x", artifact={"word_D": word})
        return method(backbone, models, order).image_B3hw

    first = drawn([0, 1, 2], 1)
    assert torch.isfinite(first[0]).all()
    assert torch.equal(drawn([2, 1, 0], 0)[2], first[0])


def test_methods_of_the_same_token_share_its_artifact_whatever_else_they_do():
    token = {"steps": 7, "lr": 0.01}
    one = TextualInversion(TextualInversion.Config(token=token, steps=9)).prepared()
    assert one == DaFusion(DaFusion.Config(token=token, strengths=(0.5,))).prepared()
    assert one == Genie(Genie.Config(token={**token, "placeholder": "<other>"}, ratio=0.3)).prepared()
    assert one != TextualInversion(TextualInversion.Config(token={**token, "lr": 0.02})).prepared()


def test_the_class_is_replaced_as_a_whole_word():
    assert with_token("a string of a ring.", "ring", "<token>") == "a string of a <token>."
    assert with_token("a red star", "red star", r"\1") == r"a \1"


@pytest.mark.parametrize("method", [TextualInversion, DaFusion, Genie])
@pytest.mark.parametrize(
    ("token", "prompt", "said"),
    [
        ({"placeholder": "gear"}, "a octagon", "'gear' is in the model's vocabulary already"),
        ({"placeholder": "q"}, "a octagon", "'q' is in the model's vocabulary already"),
        ({"start": "zebra"}, "a octagon", r"'zebra' is 5 tokens .* a word that it knows as one, or null"),
        ({"start": ""}, "a octagon", r"'' is 0 tokens"),
        ({}, "a photo of octagons", r"'a photo of octagons' does not name the class 'octagon'"),
        ({"placeholder": "to of"}, "a photo of a octagon", r"'to of' stands in the prompt .* already"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(method, token, prompt, said, models):
    facts = BackboneFacts(BackboneSettings())
    check = method(method.Config(token=token)).check
    with pytest.raises(UserError, match=said):
        check(facts, models, "octagon", prompt)
    method(method.Config(token={})).check(facts, models, "octagon", "a photo of a octagon")


@pytest.mark.parametrize("templates", [(), ("a photo",), ("a {token} {token}",)])
def test_templates_have_the_word_once(templates):
    with pytest.raises(ValidationError, match="templates"):
        TokenSettings(templates=templates)


def test_every_setting_of_a_token_is_explained():
    assert all(info.description for info in TokenSettings.model_fields.values())
