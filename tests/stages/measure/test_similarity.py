"""In-batch similarity: written out pair by pair, and with rows that are not there."""

import math
from itertools import combinations

import pytest
import torch

from stages.contract import Question
from stages.measure.similarity import Similarity, mean_cosine_to_others

QUESTION = Question("star", "a photo of a star")


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_its_mean_over_a_batch_is_the_mean_over_all_pairs():
    image_BE = rows(6, 5)
    pairs = [
        float(torch.nn.functional.cosine_similarity(image_BE[i], image_BE[j], dim=0))
        for i, j in combinations(range(6), 2)
    ]
    similarity_B = mean_cosine_to_others(image_BE, torch.ones(6, dtype=torch.bool))
    assert float(similarity_B.mean()) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_a_row_is_not_compared_with_itself():
    image_BE = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 3, 0]])
    similarity_B = mean_cosine_to_others(image_BE, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(similarity_B, torch.tensor([0, 0.5, 0.5], dtype=torch.float64))


def test_what_is_not_there_counts_for_nobody():
    image_BE = rows(5, 4)
    poisoned = image_BE.clone()
    poisoned[1] = torch.nan
    there_B = torch.tensor([True, False, True, False, True])
    similarity_B = mean_cosine_to_others(poisoned, there_B)
    alone = mean_cosine_to_others(image_BE[there_B], torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(similarity_B[there_B], alone)


def test_failed_candidates_are_left_out_and_without_another_image_there_is_no_number(models):
    method = Similarity(Similarity.Config())
    image_B3hw = rows(4, 3, 64, 64).clamp(-1, 1)

    def scores(image_B3hw):
        return method.score(models, image_B3hw, QUESTION)["similarity"]

    whole = scores(image_B3hw)
    image_B3hw[2] = 0
    without = scores(image_B3hw)
    assert [without[n] for n in (0, 1, 3)] == pytest.approx(scores(image_B3hw[[0, 1, 3]]), abs=1e-6)
    assert without[0] != pytest.approx(whole[0], abs=1e-6)
    image_B3hw[[1, 3]] = 0
    assert math.isnan(scores(image_B3hw)[0])


def test_a_dark_a_bright_and_a_middling_image_are_there(models):
    """The two greys between which 0 lies are images: only what is 0 all over has failed."""
    level = torch.tensor([-1.0, 1.0, 127 / 127.5 - 1, 128 / 127.5 - 1])
    image_B3hw = level[:, None, None, None].expand(-1, 3, 64, 64)
    with torch.no_grad():
        image_BE = models.clip("tangram").encode_image(image_B3hw)
    everyone = mean_cosine_to_others(image_BE, torch.ones(4, dtype=torch.bool)).tolist()
    assert Similarity(Similarity.Config()).score(models, image_B3hw, QUESTION)["similarity"] == everyone


def test_copies_are_as_similar_as_can_be(models):
    image_B3hw = rows(1, 3, 64, 64).clamp(-1, 1).expand(3, -1, -1, -1)
    found = Similarity(Similarity.Config()).score(models, image_B3hw, QUESTION)["similarity"]
    assert found == pytest.approx([1.0] * 3, abs=1e-9)
