"""Redrawing: how many steps each ratio makes, where it starts, and branches that share a batch."""

import pytest
import torch

from schemas.errors import UserError
from stages.backbones.diffusion.load import BackboneFacts
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import Order, Sampler
from stages.generate.genie import Genie
from stages.generate.image_to_image import ImageToImage
from stages.generate.redraw import redraw, redraw_rows
from stages.generate.text_to_image import TextToImage
from stages.sampling import condition, steps_of

RATIOS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("ratio", "steps"), [*zip(RATIOS, (15, 25, 30, 35, 40, 45, 50), strict=True)])
def test_a_ratio_makes_its_share_of_fifty_steps(ratio, steps):
    assert steps_of(ratio, 50) == steps


def test_a_share_is_taken_of_the_decimal_number():
    assert [steps_of(r, 100) for r in (0.29, 0.57, 0.58)] == [29, 57, 58]
    assert steps_of(0.599, 10) == 5


class Recorder:
    """A backbone that notes at which timesteps, and with how many rows, it is asked."""

    def __init__(self, backbone):
        self._backbone, self.asked = backbone, []

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def embed_words(self, prompt, words):
        raise NotImplementedError

    def predict(self, z_BCHW, t, text):
        self.asked.append((t, len(z_BCHW)))
        return self._backbone.predict(z_BCHW, t, text)


def redrawn(backbone, ratios, guidance=1.0, batch=2, steps=50, seed=0):
    z0 = noise(batch, *backbone.latent_shape, seed=seed).double()
    n = noise(batch, *backbone.latent_shape, seed=seed + 100).double()
    asked = condition(backbone, "a fox", guidance, batch)
    return redraw(backbone, z0, n, asked, Sampler(steps, guidance), ratios), z0, n


def test_each_ratio_starts_at_its_timestep(gaussian_backbone):
    """The paper's schedule rounds to 300 and 500 where the trailing one has 299 and 499."""
    first = {}
    for ratio in RATIOS:
        backbone = Recorder(gaussian_backbone(spacing="trailing"))
        redrawn(backbone, [ratio])
        first[ratio] = backbone.asked[0][0]
        assert len(backbone.asked) == steps_of(ratio, 50)
    assert list(first.values()) == [299, 499, 599, 699, 799, 899, 999]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_what_comes_back_is_the_exact_flow_from_the_noised_image(gaussian_backbone, kind):
    """Its error shrinks with the steps, in first order: DDIM is Euler's method."""
    errors = []
    for steps in (50, 100, 200):
        backbone = gaussian_backbone(kind)
        (z,), z0, n = redrawn(backbone, [0.6], steps=steps)
        levels = backbone.schedule.path(steps).levels
        start = levels[steps - steps_of(0.6, steps)]
        noised = start.signal * z0 + start.noise * n
        exact = backbone.transport(noised, start, levels[-1], "a fox")
        errors.append(float((z - exact).abs().max()))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_branches_that_share_a_batch_are_those_of_separate_runs_in_as_few_calls_as_the_longest(load_tiny):
    backbone = Recorder(load_tiny())
    ratios, z0, n = (0.6, 0.7, 0.8), noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    asked = condition(backbone, "a fox", 3.0, 2)
    together = redraw(backbone, z0, n, asked, Sampler(50, 3.0), ratios)
    calls = len(backbone.asked)
    backbone.asked.clear()
    for m, ratio in enumerate(ratios):
        (alone,) = redraw(backbone, z0, n, asked, Sampler(50, 3.0), [ratio])
        torch.testing.assert_close(together[m], alone, rtol=0, atol=1e-5)
    assert (calls, len(backbone.asked)) == (40, 105)
    assert {rows for _, rows in backbone.asked} == {4}  # two rows, guided


def test_branches_come_back_in_the_order_of_their_ratios(gaussian_backbone):
    backbone = gaussian_backbone()
    mixed, z0, _ = redrawn(backbone, [0.9, 0.3, 0.005, 0.9])
    for m, ratio in enumerate((0.9, 0.3, 0.005, 0.9)):
        torch.testing.assert_close(mixed[m], redrawn(backbone, [ratio])[0][0])
    assert torch.equal(mixed[2], z0)  # no whole step


def order(backbone, batch=2, seed=0):
    z = noise(batch, *backbone.latent_shape, seed=seed)
    image = noise(batch, 3, backbone.image_size, backbone.image_size, seed=seed + 1).tanh()
    return Order("a red star", z, source_B3hw=image)


@pytest.mark.parametrize("method", [ImageToImage, Genie])
def test_at_ratio_one_the_source_is_forgotten(backbone, models, method):
    wanted = order(backbone)
    made = method(method.Config(ratio=1, steps=4, guidance=2.0))(backbone, models, wanted)
    text = TextToImage(TextToImage.Config(steps=4, guidance=2.0))(backbone, models, wanted)
    assert torch.equal(made.image_B3hw, text.image_B3hw)
    assert made.noise_ratios == [1, 1]


def test_the_nearer_to_its_source_the_smaller_the_ratio(tangram, models):
    wanted = order(tangram)
    again = tangram.decode(tangram.encode(wanted.source_B3hw)).clamp(-1, 1)
    distances = []
    for ratio in (0.2, 0.5, 0.9):
        made = Genie(Genie.Config(ratio=ratio, steps=10, guidance=1.0))(tangram, models, wanted)
        distances.append(float((made.image_B3hw - again).square().mean()))
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    method = Genie(Genie.Config(ratio=0.5, steps=4, guidance=2.0))
    wanted = order(backbone, 3)

    def drawn(rows, poison):
        z, image = wanted.z_BCHW[rows].clone(), wanted.source_B3hw[rows].clone()
        z[poison] = torch.nan
        return method(backbone, models, Order("a red star", z, source_B3hw=image)).image_B3hw

    assert torch.equal(drawn([0, 1, 2], 2)[0], drawn([2, 1, 0], 1)[2])


def test_presets_are_the_numbers_that_they_stand_for():
    config = ImageToImage.Config(ratio="low")
    assert config.ratio == 0.3
    assert config == ImageToImage.Config(ratio=0.3)
    assert ImageToImage.Config(ratio="high").ratio == 0.7


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, "middle"])
@pytest.mark.parametrize("method", [ImageToImage, Genie])
def test_ratios_outside_their_range_are_refused(method, ratio):
    with pytest.raises(ValueError, match="ratio"):
        method.Config(ratio=ratio)


def test_a_ratio_of_no_step_is_the_users_mistake(models):
    with pytest.raises(UserError, match=r"noise ratio 0.1 of 4 steps makes none.* at least 0.25"):
        Genie(Genie.Config(ratio=0.1, steps=4)).check(
            BackboneFacts(BackboneSettings()), models, "fox", "a fox"
        )


def test_rows_of_their_own_ratios_are_those_of_separate_runs(gaussian_backbone):
    backbone, ratios = Recorder(gaussian_backbone()), (0.9, 0.3, 0.005, 1.0, 0.3)
    z0, n = noise(5, 4, 4, 4).double(), noise(5, 4, 4, 4, seed=1).double()
    asked = condition(backbone, "a fox", 1.0, 5)
    rows = redraw_rows(backbone, z0, n, asked, Sampler(50, 1.0), ratios)
    assert [batch for _, batch in backbone.asked] == [5] * 50
    for row, ratio in enumerate(ratios):
        (alone,) = redraw(backbone, z0, n, asked, Sampler(50, 1.0), [ratio])
        torch.testing.assert_close(rows[row], alone[row])
    assert torch.equal(rows[2], z0[2])  # no whole step


@pytest.mark.parametrize("others", [(1.0, 0.75), (0.25, 0.25), (0.5, 0.1)])
def test_when_the_neighbours_begin_changes_no_bit_of_a_row(backbone, others):
    """Their ratios cut the path at other steps, and their noise may be no number at all."""
    size = backbone.image_size
    z0 = backbone.encode(noise(3, 3, size, size).tanh()).detach()
    n, asked = noise(3, *backbone.latent_shape, seed=1), condition(backbone, "a red star", 2.0, 3)

    def row(ratios, slot):
        order = [1, 2, 0] if slot == 2 else [0, 1, 2]
        noises = n[order].clone()
        noises[(slot + 1) % 3] = torch.nan
        with torch.no_grad():
            return redraw_rows(backbone, z0[order], noises, asked, Sampler(8, 2.0), ratios)[slot]

    alone = row((0.5, 0.5, 0.5), 0)
    assert torch.isfinite(alone).all()
    assert torch.equal(row((0.5, *others), 0), alone)
    assert torch.equal(row((*others, 0.5), 2), alone)
