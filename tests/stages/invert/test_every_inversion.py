"""What every inversion of a diffusion model owes, whatever its way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract import Sampler
from stages.invert.belm import Belm
from stages.invert.ddim import DdimInversion
from stages.invert.fixed_point import FixedPoint
from stages.invert.regularized import RegularizedInversion
from stages.sampling import denoise

# With settings under which it is as exact as it can be.
METHODS = [
    (DdimInversion, {}),
    (FixedPoint, {"iterations": 60, "tolerance": 1e-11, "start_noise": 0.0}),
    (Belm, {}),
    (RegularizedInversion, {"autocorrelation": 0.0, "kl": 0.0}),
]


def inverted(cls, backbone, image_B3hw, **config):
    return cls(cls.Config(**config))(backbone, image_B3hw, "a red star")


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (DdimInversion, {"guidance": 2.0}),
        (FixedPoint, {"guidance": 2.0, "iterations": 4, "start_noise": 0.05}),
        (FixedPoint, {"iterations": 12, "start_noise": 0.0}),
        (Belm, {"guidance": 2.0}),
        (RegularizedInversion, {}),
    ],
)
def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, noise, cls, config):
    side = backbone.image_size
    row_3hw, others = noise(3, side, side).clamp(-1, 1), noise(3, 3, side, side, seed=1).clamp(-1, 1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    first = inverted(cls, backbone, torch.stack([row_3hw, *others]), steps=4, **config)
    other = inverted(cls, backbone, torch.stack([*poisoned.flip(0), row_3hw]), steps=4, **config)
    assert torch.equal(other.z_BCHW[3], first.z_BCHW[0])
    assert other.measures[3] == first.measures[0]
    assert not torch.isfinite(other.z_BCHW[1]).any()


@pytest.mark.parametrize(("cls", "config"), METHODS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), steps=st.integers(2, 30), guidance=st.sampled_from([1.0, 3.0]))
def test_where_the_noise_does_not_depend_on_the_latent_the_way_back_is_exact(
    gaussian_backbone, noise, cls, config, spacing, seed, steps, guidance
):
    """Of BELM this is true under its own sampler only."""

    class Constant(gaussian_backbone):
        def predict(self, z_BCHW, t, text):
            return super().predict(torch.ones_like(z_BCHW), t, text)

    image_B3hw = noise(2, 3, 4, 4, seed=seed).clamp(-1, 1)
    error = "belm_mse" if cls is Belm else "latent_mse"
    result = inverted(cls, Constant(spacing=spacing), image_B3hw, steps=steps, guidance=guidance, **config)
    assert max(measure[error] for measure in result.measures) < 1e-16


@pytest.mark.parametrize(("cls", "config"), METHODS)
def test_both_predictions_of_one_denoiser_give_one_seed(gaussian_backbone, noise, cls, config):
    image_B3hw = noise(2, 3, 4, 4).clamp(-1, 1)
    seeds = [
        inverted(cls, gaussian_backbone(kind), image_B3hw, steps=7, guidance=2.0, **config).z_BCHW
        for kind in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*seeds, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("cls", "config"), METHODS)
def test_the_more_steps_the_nearer_to_what_the_sampler_draws(gaussian_backbone, noise, cls, config):
    backbone, image_B3hw = gaussian_backbone(), noise(2, 3, 4, 4).clamp(-1, 1)
    errors = []
    for steps in (10, 40, 160):
        result = inverted(cls, backbone, image_B3hw, steps=steps, **config)
        again_BCHW = denoise(backbone, result.z_BCHW, "a red star", Sampler(steps, 1.0))
        errors.append(float((again_BCHW - backbone.encode(image_B3hw)).square().mean()))
        assert errors[-1] == pytest.approx(sum(m["latent_mse"] for m in result.measures) / 2)
    if cls is FixedPoint:
        assert max(errors) < 1e-18
    else:
        assert errors[0] > 4 * errors[1] > 16 * errors[2]
