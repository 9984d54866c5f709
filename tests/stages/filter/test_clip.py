"""The CLIP filter's scores against open_clip itself, and its decisions on scores written by hand."""

import math

import open_clip
import pytest
import torch
from pydantic import ValidationError

from stages.backbones.weights import TANGRAM
from stages.contract import Question
from stages.filter.clip import UNRIVALLED, ClipFilter, similarity_and_margin

QUESTION = Question(
    "red star", "a photo of a red star", {"heart": "a photo of a heart", "ring": "a photo of a ring"}
)


def test_scores_are_those_of_open_clip(models):
    folder = f"local-dir:{TANGRAM / 'clip'}"
    network, tokenizer = open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)
    image_B3hw = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        image_BE = network.encode_image(image_B3hw, normalize=True)  # tangram's mean and s.d. are 0.5
        text_KE = network.encode_text(tokenizer([QUESTION.prompt, *QUESTION.others.values()]), normalize=True)
        cosine_BK = image_BE @ text_KE.T
    scores = ClipFilter(ClipFilter.Config()).score(models, image_B3hw, QUESTION)
    margin_B = cosine_BK[:, 0] - torch.maximum(cosine_BK[:, 1], cosine_BK[:, 2])
    assert scores["similarity"] == pytest.approx(cosine_BK[:, 0].tolist(), abs=1e-6)
    assert scores["margin"] == pytest.approx(margin_B.tolist(), abs=1e-6)
    assert set(scores) == set(ClipFilter(ClipFilter.Config()).columns())


def test_the_margin_is_positive_exactly_where_the_target_is_the_nearest_text():
    generator = torch.Generator().manual_seed(1)
    image_BE, text_KE = torch.randn(200, 8, generator=generator), torch.randn(4, 8, generator=generator)
    similarity_B, margin_B = similarity_and_margin(image_BE, text_KE)
    nearest_B = torch.nn.functional.cosine_similarity(image_BE[:, None], text_KE[None], dim=2).argmax(dim=1)
    assert torch.equal(margin_B > 0, nearest_B == 0)
    assert 20 < int((nearest_B == 0).sum()) < 180
    assert similarity_B.dtype == margin_B.dtype == torch.float64


def test_lengths_of_features_do_not_matter():
    image_BE, text_KE = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    for ours, scaled in zip(
        similarity_and_margin(image_BE, text_KE),
        similarity_and_margin(5 * image_BE, 0.1 * text_KE),
        strict=True,
    ):
        torch.testing.assert_close(ours, scaled)


def test_without_another_class_the_margin_is_the_largest_there_is(models):
    image_B3hw = torch.zeros(2, 3, 64, 64)
    scores = ClipFilter(ClipFilter.Config()).score(models, image_B3hw, Question("star", "a photo of a star"))
    assert scores["margin"] == [UNRIVALLED] * 2
    assert ClipFilter(ClipFilter.Config(margin=2.0)).decide({"similarity": 0.1, "margin": UNRIVALLED}).passed


@pytest.mark.parametrize(
    ("settings", "scores", "passed", "rule", "score", "threshold"),
    [
        ({}, {"similarity": 0.3, "margin": 0.0}, True, "clip.margin", 0.0, 0.0),
        ({}, {"similarity": 0.3, "margin": -1e-9}, False, "clip.margin", -1e-9, 0.0),
        ({"margin": 0.02}, {"similarity": 0.3, "margin": 0.013}, False, "clip.margin", 0.013, 0.02),
        ({"margin": 0.02}, {"similarity": -1.0, "margin": 0.03}, True, "clip.margin", 0.03, 0.02),
        ({"similarity": 0.25}, {"similarity": 0.2, "margin": 0.1}, False, "clip.similarity", 0.2, 0.25),
        ({"similarity": 0.25}, {"similarity": 0.25, "margin": 0.1}, True, "clip.margin", 0.1, 0.0),
        ({"similarity": 0.25}, {"similarity": 0.2, "margin": -0.1}, False, "clip.margin", -0.1, 0.0),
    ],
)
def test_decisions(settings, scores, passed, rule, score, threshold):
    verdict = ClipFilter(ClipFilter.Config(**settings)).decide(scores)
    assert (verdict.passed, verdict.rule) == (passed, rule)
    assert (verdict.score, verdict.threshold) == (score, threshold)


def test_a_reason_reads_as_a_comparison():
    verdict = ClipFilter(ClipFilter.Config(margin=0.02)).decide({"similarity": 0.3, "margin": 0.013})
    assert verdict.reason == "margin 0.013 < 0.02"


@pytest.mark.parametrize("column", ["similarity", "margin"])
def test_nan_is_no_evidence(column):
    method = ClipFilter(ClipFilter.Config(margin=-2, similarity=-1))
    assert method.decide({"similarity": 0.5, "margin": 0.5}).passed
    assert not method.decide({"similarity": 0.5, "margin": 0.5, column: math.nan}).passed


def test_thresholds_are_not_among_the_settings_that_scores_depend_on():
    loose, strict = ClipFilter(ClipFilter.Config()), ClipFilter(ClipFilter.Config(margin=0.5, similarity=0.5))
    assert loose.scored() == strict.scored()
    assert loose.scored() != ClipFilter(ClipFilter.Config(model="ViT-B-32/laion2b_s34b_b79k")).scored()


def test_a_threshold_that_nothing_can_reach_is_refused():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        ClipFilter.Config(similarity=20)
