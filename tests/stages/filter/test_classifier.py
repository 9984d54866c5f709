"""The classifier filter's probabilities, names and decisions."""

import math

import pytest
import torch

from schemas.errors import UserError
from stages.backbones.classifier import class_index
from stages.contract import Question
from stages.filter.classifier import ClassifierFilter


def images(count, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_probabilities_are_a_softmax_over_all_classes(models):
    method, classifier = ClassifierFilter(ClassifierFilter.Config()), models.classifier("tangram")
    scores = [
        method.score(models, images(3), Question(name, f"a photo of a {name}"))["probability"]
        for name in classifier.classes
    ]
    assert [sum(column) for column in zip(*scores, strict=True)] == pytest.approx([1.0] * 3)
    with torch.no_grad():
        logits_BK = classifier.logits(images(3)).double()
    assert torch.tensor(scores).T.argmax(1).tolist() == logits_BK.argmax(1).tolist()
    k = 5
    expected_B = 1 / (logits_BK - logits_BK[:, k : k + 1]).exp().sum(dim=1)
    assert scores[k] == pytest.approx(expected_B.tolist())


@pytest.mark.parametrize(
    "name", ["six_pointed_star", "six pointed star", "Six-Pointed  Star", " SIX_POINTED star"]
)
def test_names_are_compared_as_people_read_them(models, name):
    method, classes = ClassifierFilter(ClassifierFilter.Config()), models.classifier("tangram").classes
    assert class_index(name, classes, "tangram") == classes.index("six_pointed_star")
    plain, written = (method.score(models, images(2), Question(n, "")) for n in ("six_pointed_star", name))
    assert plain == written


def test_a_class_that_the_classifier_lacks_is_the_users_mistake(models):
    method = ClassifierFilter(ClassifierFilter.Config())
    method.check(models, Question("heart", ""))
    with pytest.raises(
        UserError, match=r"does not know the class 'red heart'; it knows circle, square, .*trapezoid"
    ):
        method.check(models, Question("red heart", ""))


@pytest.mark.parametrize(
    ("threshold", "score", "passed"),
    [(0.5, 0.5, True), (0.5, 0.499, False), (0.0, 0.0, True), (0.0, math.nan, False)],
)
def test_decisions(threshold, score, passed):
    verdict = ClassifierFilter(ClassifierFilter.Config(probability=threshold)).decide({"probability": score})
    assert (verdict.passed, verdict.rule, verdict.threshold) == (passed, "classifier.probability", threshold)
    assert verdict.score == pytest.approx(score, nan_ok=True)


def test_a_reason_reads_as_a_comparison():
    verdict = ClassifierFilter(ClassifierFilter.Config()).decide({"probability": 0.12345678})
    assert verdict.reason == "probability 0.1235 < 0.5"


def test_thresholds_are_not_among_the_settings_that_scores_depend_on():
    settings = [ClassifierFilter.Config(), ClassifierFilter.Config(probability=0.9)]
    assert ClassifierFilter(settings[0]).scored() == ClassifierFilter(settings[1]).scored()
