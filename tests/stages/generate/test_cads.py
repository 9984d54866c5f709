"""CADS: its schedule, the statistics of the condition, and whose noise it is."""

import pytest
import torch

from pipeline.build import resolve
from pipeline.config import load
from schemas.errors import UserError
from stages.contract import Chance, Order
from stages.generate.cads import Cads, anneal, gamma
from tests.small_build import make_config, noise_recipe


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chances(*indices):
    return [Chance(i, ("test",)) for i in indices]


def drawn(backbone, models, order, **settings):
    return Cads(Cads.Config(**settings))(backbone, models, order).image_B3hw


@pytest.fixture
def asked(tangram, monkeypatch):
    """The texts of every call of the model, in order."""
    texts: list[torch.Tensor] = []
    predict = tangram.predict

    def watched(z_BCHW, t, text):
        texts.append(text.tokens_BLD)
        return predict(z_BCHW, t, text)

    monkeypatch.setattr(tangram, "predict", watched)
    return texts


@pytest.mark.parametrize(
    ("t", "share"), [(1.0, 0.0), (0.9, 0.0), (0.825, 0.25), (0.75, 0.5), (0.6, 1.0), (0.1, 1.0)]
)
def test_the_schedule(t, share):
    assert gamma(t, 0.6, 0.9) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_rescaled_condition_keeps_mean_and_deviation(tangram, share):
    text_BLD = tangram.embed(["a red star", "a ring"]).tokens_BLD
    noised_BLD = anneal(text_BLD, noise(*text_BLD.shape), share, 0.25, 1.0)
    assert (noised_BLD - text_BLD).abs().max() > 0.01
    for noised_LD, text_LD in zip(noised_BLD, text_BLD, strict=True):
        assert float(noised_LD.mean()) == pytest.approx(float(text_LD.mean()), abs=1e-6)
        assert float(noised_LD.std()) == pytest.approx(float(text_LD.std()), rel=1e-5)


def test_without_rescaling_condition_and_noise_add_up_and_psi_mixes(tangram):
    text_BLD = tangram.embed(["a red star"]).tokens_BLD
    noise_BLD = noise(*text_BLD.shape)
    plain, half, whole = (anneal(text_BLD, noise_BLD, 0.36, 0.5, psi) for psi in (0.0, 0.5, 1.0))
    torch.testing.assert_close(plain, 0.6 * text_BLD + 0.5 * 0.8 * noise_BLD)
    torch.testing.assert_close(half, (plain + whole) / 2)
    assert (whole - plain).abs().max() > 0.01


def test_noise_is_fresh_in_every_step_until_the_condition_is_clean(tangram, models, asked):
    order = Order("a red star", noise(2, *tangram.latent_shape), chances=chances(0, 1))
    drawn(tangram, models, order, steps=10)
    negative_BLD, text_BLD = (tangram.embed([p] * 2).tokens_BLD for p in ("", "a red star"))
    assert len(asked) == 10
    for k, both in enumerate(asked):
        assert torch.equal(both[:2], negative_BLD)
        assert torch.equal(both[2:], text_BLD) == (k >= 4)  # t = 0.6 at k = 4
    early = [row_LD for both in asked[:4] for row_LD in both[2:]]
    assert all(not torch.equal(a, b) for i, a in enumerate(early) for b in early[:i])
    share_of = [torch.nn.functional.cosine_similarity(a.flatten(), text_BLD[0].flatten(), 0) for a in early]
    assert share_of[0].abs() < 0.5  # t = 1: noise alone
    assert share_of[6] > share_of[0]


def test_the_unconditional_half_can_have_noise_of_its_own(tangram, models, asked):
    order = Order("a red star", noise(1, *tangram.latent_shape), chances=chances(0))
    drawn(tangram, models, order, steps=10)
    drawn(tangram, models, order, steps=10, noised="both")
    alone, both = asked[0], asked[10]
    assert torch.equal(both[1], alone[1])
    assert not torch.equal(both[0], alone[0])
    assert (both[0] - both[1]).std() > 0.1
    assert torch.equal(asked[-1], asked[9])


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan

    def made(latents, indices):
        order = Order("a red star", torch.stack(latents), chances=chances(*indices))
        return drawn(backbone, models, order, steps=4)

    first = made([row_CHW, *others], [7, 1, 2, 3])
    other = made([*poisoned.flip(0), row_CHW], [3, 5, 6, 7])
    assert torch.equal(other[3], first[0])
    assert not torch.equal(made([row_CHW, *others], [8, 1, 2, 3])[0], first[0])


def test_a_plan_refuses_thresholds_in_the_wrong_order(tmp_path):
    recipe = noise_recipe(generate={"method": "cads", "tau1": 0.95})
    with pytest.raises(
        UserError, match=r"tau1 0\.95 and tau2 0\.9 given; tau1 must be the smaller"
    ) as caught:
        resolve(load(make_config(tmp_path, recipes={"plain": recipe})))
    assert "\n" not in str(caught.value)
