"""The safety checker filter's decisions, and that its score can be asked again with another threshold."""

import math

import pytest
from pydantic import ValidationError

from stages import registry
from stages.filter.safety_checker import SafetyCheckerFilter


def make(**settings):
    return SafetyCheckerFilter(SafetyCheckerFilter.Config(model="owner/name", **settings))


@pytest.mark.parametrize(
    ("above", "margin", "passed"),
    [
        (0.0, 0.0, True),
        (0.0, 0.001, False),
        (0.0, -0.2, True),
        (-0.05, -0.01, False),
        (0.05, 0.01, True),
        (2.0, math.nan, False),
    ],
)
def test_decisions(above, margin, passed):
    verdict = make(above=above).decide({"margin": margin})
    assert (verdict.passed, verdict.rule, verdict.threshold) == (passed, "safety_checker.margin", above)
    assert verdict.score == pytest.approx(margin, nan_ok=True)


def test_a_reason_reads_as_a_comparison():
    assert make().decide({"margin": 0.013}).reason == "margin 0.013 > 0"
    assert make(above=0.02).decide({"margin": 0.013}).reason == "margin 0.013 ≤ 0.02"


def test_the_threshold_is_not_among_the_settings_that_scores_depend_on():
    assert make().scored() == make(above=0.5).scored() == {"method": "safety_checker", "model": "owner/name"}
    assert make().models() == {"safety_checker": "owner/name"}


def test_whose_checker_must_be_said():
    assert registry.resolve("filter", "safety_checker") is SafetyCheckerFilter
    with pytest.raises(ValidationError, match="model"):
        SafetyCheckerFilter.Config()
