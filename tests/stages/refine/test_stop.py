"""The rules by which a row stops."""

import math

import pytest
import torch
from pydantic import ValidationError

from schemas.errors import UserError
from stages.backbones.models import LoadedModels
from stages.refine.seedselect import SeedSelect
from stages.refine.stop import Plateau, Recognised


@pytest.mark.parametrize(
    ("losses", "reached"),
    [
        ([5.0], False),
        ([5.0, 5.0], False),  # the last two have nothing before them
        ([5.0, 5.0, 5.0], True),
        ([5.0, 4.0, 3.9], False),
        ([5.0, 4.95, 4.9], True),  # together a fall of 0.1, which is the least that counts as one
        ([5.0, 4.0, 4.2, 3.5], False),
        ([5.0, 4.0, 4.2, 3.95], True),
        ([5.0, 4.5, 5.2], False),  # the better of the last two counts
        ([5.0, 6.0, 7.0], True),
        ([math.nan] * 5, False),
    ],
)
def test_a_plateau_is_no_fall_over_the_last_iterations(losses, reached):
    assert Plateau(plateau=0.1001, patience=2).reached(losses) == reached


def test_a_picture_is_recognised_from_its_probability_on(simple_models):
    """Two classes with logits ±20m: p = 1 / (1 + exp(−40m)), and p = 0.9 at m = ln 9 / 40."""
    edge = math.log(9) / 40
    mean_B = torch.tensor([edge + 1e-3, edge - 1e-3, -0.5, 9.0, math.nan])
    image_B3hw = mean_B[:, None, None, None].expand(-1, 3, 4, 4)
    rule = Recognised(classifier="any", probability=0.9)
    assert rule.reached(simple_models(4), "Bright", image_B3hw) == [True, False, False, True, False]
    assert rule.reached(simple_models(4), "dark", image_B3hw) == [False, False, True, False, False]


def test_an_unknown_class_or_model_is_told_before_weights_are_loaded():
    models = LoadedModels(torch.device("cpu"))
    Recognised(classifier="tangram").check(models, "six pointed star")
    with pytest.raises(UserError, match="the classifier tangram does not know the class 'gryphon'; it knows"):
        Recognised(classifier="tangram").check(models, "gryphon")
    with pytest.raises(UserError, match="unknown classifier '/no/folder'; give tangram, a folder"):
        Recognised(classifier="/no/folder").check(models, "circle")
    assert models._classifier.cache_info().currsize == 0


@pytest.mark.parametrize("stop", [{"until": 3}, {}, "plateau", {"plateau": 0.1, "classifier": "tangram"}])
def test_a_rule_that_there_is_not_is_told_in_a_line(stop):
    with pytest.raises(ValidationError) as raised:
        SeedSelect.Config(stop=stop)
    (error,) = raised.value.errors()
    assert error["loc"] == ("stop",)
    assert error["msg"] == (
        "must be {plateau: FALL, patience: ITERATIONS} or {classifier: MODEL, probability: P}"
    )


def test_a_rule_survives_being_written_down():
    for stop in ({"plateau": 0.1, "patience": 3}, {"classifier": "tangram", "probability": 0.8}):
        config = SeedSelect.Config(stop=stop)
        assert config.model_dump(mode="json")["stop"] == stop
        assert SeedSelect.Config(**config.model_dump(mode="json")) == config
        assert SeedSelect.Config(stop=config.stop) == config
