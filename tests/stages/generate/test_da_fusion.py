"""DA-Fusion: strengths drawn for each row by itself, and image-to-image with the learned word."""

from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from schemas.errors import UserError
from stages.backbones.diffusion.load import BackboneFacts
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import DUMMY, Chance, Order
from stages.generate.da_fusion import DaFusion
from stages.generate.image_to_image import ImageToImage


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(backbone, rows, **changes):
    """Candidates by their index: the same index is the same candidate, in any batch."""
    size = backbone.image_size
    return Order(
        "a x",
        changes.get("z", torch.stack([noise(*backbone.latent_shape, seed=i) for i in rows])),
        target="x",
        chances=[Chance(i, ("test",)) for i in rows],
        source_B3hw=torch.stack([noise(3, size, size, seed=100 + i).tanh() for i in rows]),
        artifact={"word_D": backbone.word(None)},
    )


def test_each_strength_is_drawn_with_the_same_probability(gaussian_backbone, models):
    backbone = gaussian_backbone()
    asked = order(backbone, range(400), z=noise(400, *backbone.latent_shape).double())
    made = DaFusion(DaFusion.Config(steps=4, guidance=1))(backbone, models, asked)
    counts = Counter(made.noise_ratios)
    assert counts.keys() == {1.0, 0.75, 0.5, 0.25}
    chi2 = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi2 < 16.3  # 3 degrees of freedom, p = 0.001


def test_a_row_is_the_image_to_image_of_its_strength_with_the_word(tangram, models):
    """With the vector of a known word, that is the plain method's image of that word."""
    rows, settings = range(4), {"steps": 8, "guidance": 2.0}
    asked = order(tangram, rows)
    asked = Order(
        "a photo of a gear", asked.z_BCHW, "gear", asked.chances, asked.source_B3hw,
        {"word_D": tangram.word("gear")},
    )  # fmt: skip
    made = DaFusion(DaFusion.Config(**settings))(tangram, models, asked)
    assert len(set(made.noise_ratios)) > 1
    for ratio in set(made.noise_ratios):
        plain = ImageToImage(ImageToImage.Config(ratio=ratio, **settings))(tangram, models, asked)
        for row in (row for row in rows if made.noise_ratios[row] == ratio):
            torch.testing.assert_close(made.image_B3hw[row], plain.image_B3hw[row], rtol=0, atol=1e-4)
    assert made.prompts == ["a photo of a <token>"] * 4


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    method = DaFusion(DaFusion.Config(steps=4, guidance=2.0))
    first = method(backbone, models, order(backbone, [3, 4, 5]))
    for rows, poison in (([6, 9, 3], 0), ([0, 3, 7], 2), ([11, 3, 1], 0)):
        z = torch.stack([noise(*backbone.latent_shape, seed=i) for i in rows])
        z[poison] = torch.nan
        other = method(backbone, models, order(backbone, rows, z=z))
        slot = rows.index(3)
        assert torch.equal(other.image_B3hw[slot], first.image_B3hw[0])
        assert other.noise_ratios[slot] == first.noise_ratios[0]


def test_a_batch_of_dummies_beside_one_candidate_draws_the_same(load_tiny, models):
    backbone, method = load_tiny(), DaFusion(DaFusion.Config(steps=4, guidance=2.0))
    full = method(backbone, models, order(backbone, [3, 4]))
    alone = order(backbone, [3, 4])
    alone = Order(
        alone.prompt, alone.z_BCHW, alone.target, [alone.chances[0], DUMMY], alone.source_B3hw, alone.artifact
    )
    assert torch.equal(method(backbone, models, alone).image_B3hw[0], full.image_B3hw[0])


def test_a_strength_of_no_step_is_refused_by_the_plan(models):
    method = DaFusion(DaFusion.Config(steps=3))
    with pytest.raises(UserError, match=r"noise ratio 0.25 of 3 steps makes none"):
        method.check(BackboneFacts(BackboneSettings()), models, "octagon", "a octagon")


@pytest.mark.parametrize("strengths", [(), (0.5, 0), (1.2,)])
def test_strengths_outside_their_range_are_refused(strengths):
    with pytest.raises(ValidationError, match="strengths"):
        DaFusion.Config(strengths=strengths)
