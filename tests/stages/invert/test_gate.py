"""The gate: which seeds are refused, with which words, and what a second inversion changes."""

from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from stages.contract import Invert, Inverted
from stages.invert.ddim import DdimInversion
from stages.invert.gate import fault, invert_typical
from stages.invert.settings import InvertSettings, Typical

GOOD = {"norm_ratio": 1.01, "autocorrelation": 0.02, "kurtosis": -0.3}


class ByBrightness(Invert):
    """A seed's norm is the image's brightness, and with 9 steps 0.3 more. Says how often it was asked."""

    class Config(InvertSettings):
        method: Literal["by_brightness"] = "by_brightness"

    asked: list[int]

    def __call__(self, backbone, image_B3hw, prompt):
        self.asked.append(self.config.steps)
        norm_B = image_B3hw.mean(dim=(1, 2, 3)) + (0.3 if self.config.steps == 9 else 0)
        measures = [{**GOOD, "norm_ratio": float(norm), "calls": float(self.config.steps)} for norm in norm_B]
        return Inverted(norm_B[:, None, None, None].expand(-1, 4, 4, 4), measures)


@pytest.fixture
def by_brightness(gaussian_backbone):
    def invert(*norms, **typical):
        ByBrightness.asked = []
        config = ByBrightness.Config(steps=5, typical=Typical(**typical) if typical else None)
        image_B3hw = torch.tensor(norms)[:, None, None, None].expand(-1, 3, 4, 4)
        method = ByBrightness(config)
        return *invert_typical(method, gaussian_backbone(), image_B3hw, "star"), ByBrightness.asked

    return invert


@pytest.mark.parametrize(
    ("measure", "value", "said"),
    [
        ("norm_ratio", 0.8, "norm 0.800, typical is 1 ± 0.15"),
        ("norm_ratio", 1.2, "norm 1.200, typical is 1 ± 0.15"),
        ("autocorrelation", -0.2, "autocorrelation -0.200, typical is 0 ± 0.15"),
        ("kurtosis", 3.5, "kurtosis 3.500, typical is 0 ± 3"),
        ("kurtosis", float("nan"), "kurtosis nan, typical is 0 ± 3"),
        ("norm_ratio", float("inf"), "norm inf, typical is 1 ± 0.15"),
    ],
)
def test_a_reason_names_the_measure_its_value_and_what_is_typical(measure, value, said):
    assert fault({**GOOD, measure: value}, Typical()) == said


def test_typical_seeds_pass_and_a_limit_that_is_off_refuses_nothing():
    assert fault(GOOD, Typical()) == ""
    off = Typical(norm=None, kurtosis=None)
    assert fault({**GOOD, "norm_ratio": float("nan"), "kurtosis": 99.0}, off) == ""
    assert fault({**GOOD, "autocorrelation": 0.2}, off).startswith("autocorrelation 0.200")
    assert fault({**GOOD, "norm_ratio": 1.15 - 1e-9}, Typical()) == ""  # the limit itself is typical


def test_without_a_gate_every_seed_is_used(by_brightness):
    inverted, reasons, asked = by_brightness(0.1, float("nan"))
    assert (reasons, asked) == (["", ""], [5])
    assert [m["steps"] for m in inverted.measures] == [5, 5]


def test_a_refused_seed_is_given_up_at_once_or_inverted_once_more(by_brightness):
    inverted, reasons, asked = by_brightness(0.8, 1.0, norm=0.1)
    assert (reasons, asked) == (["norm 0.800, typical is 1 ± 0.1", ""], [5])
    assert [m["norm_ratio"] for m in inverted.measures] == pytest.approx([0.8, 1.0])

    inverted, reasons, asked = by_brightness(0.8, 1.0, 0.5, norm=0.15, steps=9)
    assert (reasons, asked) == (["", "", "norm 0.800, typical is 1 ± 0.15"], [5, 9])
    # 0.8 became 1.1, 1.0 stayed what it was, 0.5 became 0.8 and is still refused.
    assert [m["norm_ratio"] for m in inverted.measures] == pytest.approx([1.1, 1.0, 0.8])
    assert inverted.z_BCHW[:, 0, 0, 0].tolist() == pytest.approx([1.1, 1.0, 0.8])
    assert [m["steps"] for m in inverted.measures] == [9, 5, 9]
    assert [m["calls"] for m in inverted.measures] == [14, 5, 14]


def test_nothing_is_inverted_again_when_all_seeds_are_typical(by_brightness):
    _, reasons, asked = by_brightness(0.95, 1.05, norm=0.1, steps=9)
    assert (reasons, asked) == (["", ""], [5])


def test_a_row_knows_neither_its_neighbours_nor_its_slot_nor_whether_they_fail(tangram, noise):
    row_3hw, others = noise(3, 64, 64).clamp(-1, 1), noise(3, 3, 64, 64, seed=1).clamp(-1, 1)

    def gated(image_B3hw, norm):
        config = DdimInversion.Config(steps=3, typical=Typical(norm=norm, kurtosis=None, steps=5))
        return invert_typical(DdimInversion(config), tangram, image_B3hw, "a photo of a circle")

    alone, (reason, *_) = gated(torch.stack([row_3hw, *others]), 1e-6)
    assert reason
    poisoned = others.clone()
    poisoned[1] = torch.nan
    moved, reasons = gated(torch.stack([*poisoned.flip(0), row_3hw]), 1e-6)
    assert torch.equal(moved.z_BCHW[3], alone.z_BCHW[0])
    assert (moved.measures[3], reasons[3]) == (alone.measures[0], reason)
    # A row that passes is the first inversion's, also when another is inverted again.
    kept, reasons = gated(torch.stack([*poisoned.flip(0), row_3hw]), 10.0)
    plain = DdimInversion(DdimInversion.Config(steps=3))
    first = plain(tangram, torch.stack([*poisoned.flip(0), row_3hw]), "a photo of a circle")
    assert [bool(reason) for reason in reasons] == [False, True, False, False]
    assert torch.equal(kept.z_BCHW[3], first.z_BCHW[3])
    assert (kept.measures[3]["steps"], kept.measures[1]["steps"]) == (3, 5)


@pytest.mark.parametrize(
    ("typical", "said"),
    [
        ({"norm": -1}, "greater than 0"),
        ({"norms": 0.1}, "unknown key 'norms'; allowed: autocorrelation, kurtosis, norm, steps"),
        ({"steps": 50}, "typical.steps is 50, and so is steps"),
        ({"norm": None, "autocorrelation": None, "kurtosis": None}, "are all off; set one"),
        ({"kurtosis": True}, "must be a number"),
    ],
)
def test_a_mistake_in_its_settings_is_one_clear_line(typical, said):
    with pytest.raises(ValidationError) as caught:
        DdimInversion.Config.model_validate({"steps": 50, "typical": typical})
    (error,) = caught.value.errors()
    assert said in error["msg"]
    assert "\n" not in error["msg"]
