"""The signature of an image, and what is near to what."""

from __future__ import annotations

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages.backbones.models import LoadedModels
from stages.contract import Question
from stages.filter.duplicates import Duplicates, perceptual_hash


def duplicates(**settings) -> Duplicates:
    return Duplicates(Duplicates.Config(**settings))


def noise(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_hash_is_that_of_imagehash():
    image_B3hw = noise(5)
    for own, image_3hw in zip(perceptual_hash(image_B3hw), image_B3hw, strict=True):
        pixels = ((image_3hw + 1) * 127.5 + 0.5).floor().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        expected = imagehash.phash(Image.fromarray(pixels))
        assert f"{int(own) & (2**64 - 1):016x}" == str(expected)


def test_embeddings_are_of_unit_length_and_prepared_ones_the_same():
    method, models, image_B3hw = duplicates(model="tangram"), LoadedModels(), noise(5)
    scores = method.score(models, image_B3hw, Question("", ""))
    made = method.prepare(models, [image_B3hw[:3], image_B3hw[3:]])
    assert made["hash"].tolist() == scores["hash"]
    torch.testing.assert_close(made["embedding"], torch.tensor(scores["embedding"]))
    torch.testing.assert_close(made["embedding"].norm(dim=1), torch.ones(5))


OTHERS = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
OWN = np.array([1, 0], np.float32)


@pytest.mark.parametrize(
    ("bits", "cosine", "place"),
    [
        (64, 0.5, 0),  # all are near: the one of the highest cosine
        (2, 0.5, 1),  # the hash of the first differs in three
        (2, 0.9, None),  # none is near by both
        (None, 0.9, 0),
        (2, None, 1),
        (0, None, 2),
        (None, 0.8, 0),
    ],
)
def test_near_by_both(bits, cosine, place):
    hashes = np.array([0b111, 0b1, 0], np.int64)
    near = duplicates(bits=bits, cosine=cosine).nearest(0, OWN, hashes, OTHERS)
    assert (near and near.place) == place


def test_all_bits_count_the_sign_too():
    hashes = np.array([-1], np.int64)
    assert duplicates(bits=63, cosine=None).nearest(0, OWN, hashes, OTHERS[:1]) is None
    assert duplicates(bits=64, cosine=None).nearest(0, OWN, hashes, OTHERS[:1]).score == 64


def test_one_threshold_at_least():
    with pytest.raises(ValidationError, match="must set bits or cosine"):
        duplicates(bits=None, cosine=None)
