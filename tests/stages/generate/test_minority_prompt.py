"""MinorityPrompt: its objectives and their gradients, when it learns what, and what it leaves alone."""

import pytest
import torch
from transformers import CLIPTokenizer

from pipeline.build import resolve
from pipeline.config import load
from schemas.errors import UserError
from stages.backbones import files
from stages.contract import Chance, Order, Text
from stages.generate.minority_prompt import (
    MinorityPrompt,
    diversity_objective,
    minority_objective,
    noise_timestep,
)
from stages.generate.text_to_image import TextToImage
from stages.memory import Memory
from stages.sampling import add_noise, to_epsilon
from tests.levels import at
from tests.small_build import make_config, noise_recipe


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def doubles(*shape, seed=0):
    return noise(*shape, seed=seed, dtype=torch.float64)


def order(backbone, *indices, prompt="a red star", seed=0):
    z_BCHW = noise(len(indices), *backbone.latent_shape, seed=seed).to(backbone.dtype)
    return Order(prompt, z_BCHW, chances=[Chance(i, ("test",)) for i in indices])


def drawn(backbone, models, order, **settings):
    return MinorityPrompt(MinorityPrompt.Config(**settings))(backbone, models, order)


class Watched:
    """A backbone that remembers the timesteps and texts of its calls, and the texts with words in them."""

    def __init__(self, backbone):
        self._backbone = backbone
        self.timesteps, self.texts, self.learned = [], [], []

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def predict(self, z_BCHW, t, text):
        self.timesteps.append(t)
        self.texts.append(text.tokens_BLD.detach())
        return self._backbone.predict(z_BCHW, t, text)

    def embed_words(self, prompt, words):
        text = self._backbone.embed_words(prompt, words)
        self.learned.append(text.map(torch.Tensor.detach))
        return text


@pytest.fixture
def toy(gaussian_backbone):
    """ε(z, c) = tanh(Az + Bc) on latents of three numbers and texts of two."""
    backbone = gaussian_backbone()
    a, b = doubles(3, 3, seed=1), doubles(3, 2, seed=2)

    def predict(z_BCHW, t, text):
        return (z_BCHW[:, :, 0, 0] @ a.T + text.tokens_BLD[:, 0] @ b.T).tanh()[:, :, None, None]

    backbone.predict = predict
    return backbone


def eq_7(backbone, z_BCHW, t, learned_BLD, second_BLD, noise_BCHW, s):
    """Eq. 7 with nothing stopped, written out for an ε-model."""
    a, b = (float(backbone.schedule.alphas_cumprod[k]) for k in (t, s))
    first = (z_BCHW - (1 - a) ** 0.5 * backbone.predict(z_BCHW, t, Text(learned_BLD))) / a**0.5
    noised = b**0.5 * first + (1 - b) ** 0.5 * noise_BCHW
    second = (noised - (1 - b) ** 0.5 * backbone.predict(noised, s, Text(second_BLD))) / b**0.5
    return (first - second).square().sum()


def test_with_lambda_1_the_gradient_is_that_of_eq_7(toy):
    z_BCHW, noise_BCHW = doubles(2, 3, 1, 1, seed=3), doubles(2, 3, 1, 1, seed=4)
    learned_BLD, base_BLD = doubles(2, 1, 2, seed=5).requires_grad_(), doubles(2, 1, 2, seed=6)

    def gradient(value):
        return torch.autograd.grad(value, learned_BLD)[0]

    def ours(lambda_):
        return gradient(
            minority_objective(
                toy, z_BCHW, 300, Text(learned_BLD), Text(base_BLD), noise_BCHW, 200, lambda_
            ).sum()
        )

    whole = gradient(eq_7(toy, z_BCHW, 300, learned_BLD, base_BLD, noise_BCHW, 200))
    torch.testing.assert_close(ours(1.0), whole, rtol=1e-9, atol=1e-12)
    assert (ours(0.0) - whole).norm() > 0.05 * whole.norm()
    same_prompt_twice = gradient(eq_7(toy, z_BCHW, 300, learned_BLD, learned_BLD, noise_BCHW, 200))
    assert (ours(1.0) - same_prompt_twice).norm() > 0.05 * whole.norm()


def test_no_gradient_is_made_that_lambda_0_multiplies_away(toy):
    """The second prediction has a graph, and with it a backward pass, only where its half of J counts."""
    predict, graphs = toy.predict, []
    toy.predict = lambda *asked: (made := predict(*asked), graphs.append(made.requires_grad))[0]
    z_BCHW, noise_BCHW = doubles(2, 3, 1, 1, seed=3), doubles(2, 3, 1, 1, seed=4)
    learned_BLD, base_BLD = doubles(2, 1, 2, seed=5).requires_grad_(), doubles(2, 1, 2, seed=6)
    asked = (toy, z_BCHW, 300, Text(learned_BLD), Text(base_BLD), noise_BCHW, 200)
    half_B, whole_B = (minority_objective(*asked, lambda_) for lambda_ in (0.0, 1.0))
    assert graphs == [True, False, True, True]
    torch.testing.assert_close(2 * half_B, whole_B)
    with torch.no_grad():
        assert not minority_objective(*asked, 1.0).requires_grad


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_proposition_1_the_objective_is_the_error_of_the_model(gaussian_backbone, prediction_type):
    backbone, s = gaussian_backbone(prediction_type), 600
    z_BCHW, noise_BCHW = doubles(2, 4, 4, 4), doubles(2, 4, 4, 4, seed=1)
    learned, base = backbone.embed(["a red star"] * 2), backbone.embed(["star"] * 2)
    value_B = minority_objective(backbone, z_BCHW, 900, learned, base, noise_BCHW, s, 0.0)

    a, b = (float(backbone.schedule.alphas_cumprod[t]) for t in (900, s))
    clean_BCHW = gaussian_backbone("v_prediction").predict(z_BCHW, 900, learned)
    noised_BCHW = add_noise(a**0.5 * z_BCHW - (1 - a) ** 0.5 * clean_BCHW, noise_BCHW, at(b))
    output_BCHW = backbone.predict(noised_BCHW, s, base)
    error_BCHW = noise_BCHW - to_epsilon(noised_BCHW, output_BCHW, at(b), prediction_type)
    torch.testing.assert_close(b / (1 - b) * value_B, error_BCHW.square().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("level", "t", "steps", "s"),
    [
        (0.75, 999, 50, 750), (0.75, 1, 50, 750), (0.0001, 999, 50, 1), (0.9999, 999, 50, 999),
        ("annealed", 999, 4, 250), ("annealed", 749, 4, 500), ("annealed", 499, 4, 750),
        ("annealed", 249, 4, 999), ("annealed", 981, 50, 38), ("annealed", 1, 50, 999),
    ],
)  # fmt: skip
def test_the_noise_level_as_published_but_within_the_schedule(level, t, steps, s):
    assert noise_timestep(level, t, steps, 1000) == s


def test_words_are_learned_in_their_window_at_every_nth_step(gaussian_backbone, models):
    backbone = Watched(gaussian_backbone())
    settings = {"steps": 6, "above": 0.4, "every": 2, "iterations": 2}
    traces = drawn(backbone, models, order(backbone, 0), **settings).traces
    pair = [999, 750] * 2
    assert backbone.timesteps == [*pair, 999, 832, *[666, 750] * 2, 666, 499, 332, 166]
    assert len(traces[0]) == 4
    asked = [float(text_BLD[-1]) for text_BLD in backbone.texts]
    base = float(len("a red star"))
    assert [a == base for a in asked] == [
        *[False, True] * 2, False, True, *[False, True] * 2, False, True, True, True
    ]  # fmt: skip

    other = Watched(gaussian_backbone())
    drawn(other, models, order(other, 0), **settings, unoptimised="learned")
    asked = [float(text_BLD[-1]) for text_BLD in other.texts]
    assert len(other.learned) == 6  # two iterations and what they led to, twice: asked for no more than once
    assert asked[5] == asked[4] != base
    assert asked[-1] == asked[-2] == asked[-3] == asked[-4] != asked[4]


def test_adam_starts_anew_at_every_timestep_and_the_word_goes_on(gaussian_backbone, models):
    """Adam's first step is the learning rate, whatever the gradient."""
    backbone = Watched(gaussian_backbone())
    drawn(backbone, models, order(backbone, 0, 1), steps=5, above=0.0, iterations=1, lr=0.5)
    value_kB = torch.stack([text.tokens_BLD for text in backbone.learned])[:, :, 0, 0]
    assert len(value_kB) == 10  # before and after the one update of each step
    torch.testing.assert_close(
        (value_kB[1::2] - value_kB[::2]).abs(), torch.full((5, 2), 0.5).double(), rtol=0, atol=1e-5
    )
    assert torch.equal(value_kB[2::2], value_kB[1:-1:2])


def test_no_window_is_text_to_image(backbone, models):
    what = order(backbone, 0, 1)
    plain = TextToImage(TextToImage.Config(steps=3))(backbone, models, what)
    made = drawn(backbone, models, what, steps=3, above=1.0)
    assert torch.equal(made.image_B3hw, plain.image_B3hw)
    assert made.traces == [[], []]


def test_the_expected_objective_rises(tangram, models):
    """On noise that the words were not learned with."""
    backbone, what = Watched(tangram), order(tangram, 0, 1)
    drawn(backbone, models, what, steps=1, iterations=5, start="blue")
    base = tangram.embed(["a red star"] * 2)
    with torch.no_grad():
        before, after = (
            sum(
                minority_objective(
                    tangram, what.z_BCHW, 999, text, base,
                    noise(2, *tangram.latent_shape, seed=seed), 750, 1.0,
                )
                for seed in range(100, 104)
            )
            for text in (backbone.learned[0], backbone.learned[-1])
        )  # fmt: skip
    assert (after > 1.05 * before).all()


def test_only_the_word_changes(tangram, models):
    table_VD = tangram._encoders[0].model.get_input_embeddings().weight
    kept_VD, base_BLD = table_VD.detach().clone(), tangram.embed(["a red star"]).tokens_BLD.clone()
    backbone = Watched(tangram)
    drawn(backbone, models, order(tangram, 0, 1), steps=1, iterations=2, start="blue", tokens=2)
    started, learned = (backbone.learned[n].tokens_BLD for n in (0, -1))
    words = tangram.embed(["a red star blue blue"]).expand(2).tokens_BLD
    torch.testing.assert_close(started, words)
    torch.testing.assert_close(learned[:, :4], base_BLD.expand(2, -1, -1)[:, :4])  # start, a, red, star
    assert ((learned - started)[:, 4:6].abs().amax(dim=2) > 1e-3).all()
    assert torch.equal(table_VD, kept_VD)
    assert torch.equal(tangram._embed_uncached("a red star").tokens_BLD, base_BLD)
    assert table_VD.grad is None


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    settings = {"steps": 2, "above": 0.3, "iterations": 2}
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan

    def made(latents, indices):
        chances = [Chance(i, ("test",)) for i in indices]
        what = Order("a cat", torch.stack(latents), chances=chances)
        return drawn(backbone, models, what, **settings)

    first = made([row_CHW, *others], [7, 1, 2, 3])
    other = made([*poisoned.flip(0), row_CHW], [3, 5, 6, 7])
    assert torch.equal(other.image_B3hw[3], first.image_B3hw[0])
    assert other.traces[3] == first.traces[0] != []
    assert made([row_CHW, *others], [8, 1, 2, 3]).traces[0] != first.traces[0]


@pytest.mark.parametrize("objective", ["minority", "diversity"])
def test_what_is_kept_changes_no_bit_of_an_image(load_tiny, models, monkeypatch, objective):
    backbone = load_tiny()
    what, settings = order(backbone, 0, 1), {"steps": 2, "above": 0.0, "lr": 0.1, "objective": objective}

    def run(iterations, budget):
        memory = Memory(budget)
        monkeypatch.setattr(Memory, "spare", lambda device: memory)
        made = drawn(backbone, models, what, iterations=iterations, **settings)
        return made.image_B3hw, made.traces, memory.kept

    kept = run(1, 2**40)[2]
    one, *others = (run(2, budget) for budget in (2**40, kept, 0))
    assert one[2] == kept > 0  # what the first iteration kept is gone
    for other in others:
        assert torch.equal(other[0], one[0])
        assert other[1] == one[1]
        assert other[2] < kept


def test_diversity_is_the_spread_of_the_batch(gaussian_backbone):
    """Σ_i mean_{j≠i} ‖x_i − x_j‖² = 2B/(B−1)·Σ_i ‖x_i − x̄‖²."""
    backbone = gaussian_backbone()
    z_BCHW, text = doubles(4, 4, 4, 4), backbone.embed(["star"] * 4)
    value_B = diversity_objective(backbone, z_BCHW, 500, text)
    a = float(backbone.schedule.alphas_cumprod[500])
    epsilon = backbone.predict(z_BCHW, 500, text)
    x0_BM = ((z_BCHW - (1 - a) ** 0.5 * epsilon) / a**0.5).flatten(1)
    spread = (x0_BM - x0_BM.mean(dim=0)).square().sum()
    torch.testing.assert_close(value_B.sum(), 8 / 3 * spread)
    torch.testing.assert_close(value_B[0], (x0_BM[0] - x0_BM[1:]).square().sum(dim=1).mean())


def test_diversity_rises_and_couples_the_rows(tangram, models):
    settings = {"steps": 1, "iterations": 3, "objective": "diversity", "start": "blue"}
    what = order(tangram, 0, 1, 2)
    made = drawn(tangram, models, what, **settings)
    total = torch.tensor(made.traces).sum(dim=0)
    assert (total.diff() > 0).all()
    twins = Order(what.prompt, what.z_BCHW[[0, 1, 1]], chances=what.chances)
    with_twins = drawn(tangram, models, twins, **settings)
    assert torch.isfinite(with_twins.image_B3hw).all()
    assert not torch.equal(with_twins.image_B3hw[0], made.image_B3hw[0])


def test_one_row_has_nothing_to_differ_from(gaussian_backbone, models):
    backbone = gaussian_backbone()
    with pytest.raises(UserError, match=r"this batch has one: set the recipe's batch to at least 2"):
        drawn(backbone, models, order(backbone, 0), objective="diversity")


def refused(tmp_path, message, settings, **overrides):
    recipe = noise_recipe(generate={"method": "minority_prompt"} | settings)
    with pytest.raises(UserError, match=message) as caught:
        resolve(load(make_config(tmp_path, recipes={"plain": recipe}, **overrides)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "prompt", "message"),
    [
        ({}, "a *_0 {class}", r"the prompt already has '\*_0'; set placeholder"),
        ({"placeholder": "v", "tokens": 2}, "a v_1 {class}", r"the prompt already has 'v_1'"),
        ({"placeholder": "two words"}, "a {class}", "placeholder"),
        ({"start": "handsome"}, "a {class}", r"start 'handsome' is \d+ tokens of the backbone; give a word"),
        ({"start": ""}, "a {class}", r"start '' is 0 tokens"),
        ({"tokens": 3}, "red " * 15 + "{class}", r"has 21 tokens with the learnable ones"),
        ({"steps": 1001}, "a {class}", r"generate\.steps: 1001 given, the backbone has 1000 timesteps"),
        ({"level": 1.5}, "a {class}", "level"),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_cannot_work(tmp_path, settings, prompt, message):
    targets = [{"classes": ["ring"], "accepted": 2}]
    refused(tmp_path, message, settings, prompt=prompt, targets=targets)


def test_a_plan_refuses_a_word_that_the_vocabulary_has(tmp_path):
    folder = tmp_path / "backbone"
    folder.mkdir()
    for part in files.tangram().iterdir():
        if part.name != "tokenizer":
            (folder / part.name).symlink_to(part)
    tokenizer = CLIPTokenizer.from_pretrained(files.tangram() / "tokenizer", local_files_only=True)
    tokenizer.add_tokens(["*_0"])
    tokenizer.save_pretrained(folder / "tokenizer")
    message = r"the backbone's vocabulary already has '\*_0'; set placeholder to another word"
    refused(tmp_path, message, {}, backbone={"model": str(folder)})


def test_a_plan_takes_the_longest_prompt(tmp_path):
    recipe = noise_recipe(generate={"method": "minority_prompt", "tokens": 2, "start": "blue"})
    targets = [{"classes": ["ring"], "accepted": 2}]
    config = load(
        make_config(tmp_path, recipes={"plain": recipe}, prompt="red " * 15 + "{class}", targets=targets)
    )
    assert len(resolve(config)[1].streams) == 1
