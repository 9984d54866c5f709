"""CLIPScore against open_clip itself, and against angles drawn by hand."""

import math

import open_clip
import pytest
import torch

from stages.backbones.weights import TANGRAM
from stages.contract import Question
from stages.measure.clip_score import ClipScore, clip_score

QUESTION = Question("red star", "a photo of a red star", {"ring": "a photo of a ring"})


def noise(n):
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_scores_are_those_of_open_clip(models):
    folder = f"local-dir:{TANGRAM / 'clip'}"
    network, tokenizer = open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)
    image_B3hw = noise(5)
    with torch.no_grad():
        image_BE = network.encode_image(image_B3hw, normalize=True)  # tangram's mean and s.d. are 0.5
        cosine_B = (image_BE @ network.encode_text(tokenizer([QUESTION.prompt]), normalize=True).T)[:, 0]
    found = ClipScore(ClipScore.Config()).score(models, image_B3hw, QUESTION)["clip_score"]
    assert found == pytest.approx((100 * cosine_B.clamp(min=0)).tolist(), abs=1e-4)
    assert max(found) > 0


def test_it_is_a_hundred_times_the_cosine_and_never_negative():
    degrees = torch.tensor([0.0, 60, 90, 120, 180])
    image_BE = 7 * torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    found_B = clip_score(image_BE, torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(
        found_B, torch.tensor([100, 50, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_a_row_knows_neither_its_neighbours_nor_its_slot(models):
    image_B3hw = noise(3)
    poisoned = image_B3hw.flip(0).clone()
    poisoned[1] = torch.nan
    first, other = (
        ClipScore(ClipScore.Config()).score(models, x, QUESTION)["clip_score"] for x in (image_B3hw, poisoned)
    )
    assert (first[0], first[2]) == (other[2], other[0])
    assert math.isnan(other[1])
