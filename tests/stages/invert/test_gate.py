"""The gate: which seeds are refused, and what becomes of a row that is inverted again."""

import math

import pytest
import torch
from pydantic import ValidationError

from stages.contract import Inverted
from stages.invert.ddim import DdimInversion
from stages.invert.gate import fault, invert_typical
from stages.invert.settings import Typical

GOOD = {"norm_ratio": 1.0, "autocorrelation": 0.0, "kurtosis": 0.0}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ({}, ""),
        ({"norm_ratio": 0.86}, ""),
        ({"norm_ratio": 0.84}, "norm 0.840, typical is 1 ± 0.15"),
        ({"norm_ratio": 1.2}, "norm 1.200, typical is 1 ± 0.15"),
        ({"autocorrelation": -0.2}, "autocorrelation -0.200, typical is 0 ± 0.15"),
        ({"kurtosis": 3.5}, "kurtosis 3.500, typical is 0 ± 3"),
        ({"norm_ratio": math.nan}, "norm nan, typical is 1 ± 0.15"),
    ],
)
def test_the_reason_names_the_measure_its_value_and_its_limits(measures, reason):
    assert fault({**GOOD, **measures}, Typical()) == reason


def test_a_limit_that_is_not_set_refuses_nothing():
    lenient = Typical(norm=None, autocorrelation=None, kurtosis=None)
    assert fault({"norm_ratio": 9.0, "autocorrelation": 1.0, "kurtosis": 99.0}, lenient) == ""


@pytest.mark.parametrize("wrong", [{"norm": 0}, {"steps": 0}, {"norms": 1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValidationError):
        Typical.model_validate(wrong)


class Scaled(DdimInversion):
    """Seeds whose norm follows from the image: its brightness; at 99 steps 1 where that is above 0."""

    def __call__(self, backbone, image_B3hw, prompt):
        inverted = super().__call__(backbone, image_B3hw, prompt)
        bright_B = image_B3hw.mean(dim=(1, 2, 3))
        if self.config.steps == 99:
            bright_B = torch.where(bright_B > 0, torch.ones_like(bright_B), bright_B)
        z_BCHW = noise(1, *inverted.z_BCHW.shape[1:]) * bright_B[:, None, None, None]
        measures = [{**GOOD, "norm_ratio": float(b)} for b in bright_B]
        return Inverted(z_BCHW, measures)


def images(*brightness):
    return torch.stack([torch.full((3, 4, 4), b, dtype=torch.float64) for b in brightness])


def test_only_refused_rows_are_inverted_again_and_only_those_that_fail_again_are_given_up(gaussian_backbone):
    method = Scaled(Scaled.Config(steps=2, typical={"norm": 0.1, "steps": 99}))
    inverted, reasons = invert_typical(method, gaussian_backbone(), images(1.0, 0.5, -0.5), "star")
    assert [m["steps"] for m in inverted.measures] == [2, 99, 99]
    assert [m["norm_ratio"] for m in inverted.measures] == [1.0, 1.0, -0.5]
    assert reasons == ["", "", "norm -0.500, typical is 1 ± 0.1"]
    pattern = noise(1, 4, 4, 4)[0]
    for z_CHW, factor in zip(inverted.z_BCHW, (1.0, 1.0, -0.5), strict=True):
        torch.testing.assert_close(z_CHW, factor * pattern, check_dtype=False)


def test_without_a_gate_every_seed_passes_and_says_its_steps(gaussian_backbone):
    inverted, reasons = invert_typical(
        Scaled(Scaled.Config(steps=2)), gaussian_backbone(), images(0.1, 5.0), "star"
    )
    assert reasons == ["", ""]
    assert [m["steps"] for m in inverted.measures] == [2, 2]


def test_a_row_does_not_depend_on_which_others_are_refused(tangram):
    """The gate lies between the rows' norms at 2 steps; the row is the same beside good and bad ones."""
    image_B3hw = noise(3, 3, 64, 64).clamp(-1, 1)
    plain = DdimInversion(DdimInversion.Config(steps=2))(tangram, image_B3hw, "a circle")
    away = sorted(abs(m["norm_ratio"] - 1) for m in plain.measures)
    gate = {"norm": (away[0] + away[1]) / 2, "autocorrelation": None, "kurtosis": None, "steps": 3}
    method = DdimInversion(DdimInversion.Config(steps=2, typical=gate))
    together, _ = invert_typical(method, tangram, image_B3hw, "a circle")
    others = torch.cat([image_B3hw[:1], torch.zeros(2, 3, 64, 64)])
    apart, _ = invert_typical(method, tangram, others, "a circle")
    assert torch.equal(together.z_BCHW[0], apart.z_BCHW[0])
    assert together.measures[0] == apart.measures[0]
    assert {m["steps"] for m in together.measures} == {2.0, 3.0}
