"""Filters with models of the user's own, in a build."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from schemas.errors import UserError
from tests.local_build import accounts, config, rows, run
from tests.small_build import listing
from tests.tiny_safety_checker import save_safety_checker

pytestmark = pytest.mark.usefixtures("one_backbone")

CIRCLES = [{"classes": ["circle"], "accepted": 4, "attempts": 1}]


class Colours:
    """A CLIP model and a classifier in one: what is red is a circle, what is blue is not."""

    classes = ("circle", "gear", "ring")
    logit_scale = 1.0

    def encode_image(self, image_B3hw):
        return image_B3hw.mean(dim=(2, 3))

    def encode_text(self, texts):
        return torch.tensor([[1.0, 0, 0] if "circle" in text else [0, 0, 1.0] for text in texts])

    def logits(self, image_B3hw):
        return 100 * self.encode_image(image_B3hw)


COLOURS = "tests.pipeline.test_filters:Colours"


def filters(method, **settings):
    return {"filter": [{"method": method, **settings}], "targets": CIRCLES}


@pytest.mark.parametrize("method", ["clip", "classifier"])
def test_a_model_of_the_users_own_decides(tmp_path, method):
    run(config(tmp_path, **filters(method, model=COLOURS)))
    samples = rows(tmp_path / "out", "builds/*/shards")
    assert samples
    column = {"clip": "clip_margin", "classifier": "classifier_probability"}[method]
    assert all(sample[column] >= {"clip": 0, "classifier": 0.5}[method] for sample in samples)


def test_a_safety_checker_rejects_and_another_threshold_scores_nothing_again(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (24, 3, 4, 3), dtype=np.uint8)
    save_safety_checker(tmp_path / "model", [Image.fromarray(block).resize((64, 64)) for block in blocks])
    path = config(tmp_path, **filters("safety_checker", model=str(tmp_path / "model"), above=2))
    (lenient,) = accounts(run(path)).values()
    margins = sorted(row["safety_checker_margin"] for row in rows(tmp_path / "out", "builds/*/shards"))
    assert (lenient.accepted, len(margins)) == (4, 4)
    scored, third = listing(tmp_path / "out" / "scores"), margins[2]
    assert margins[0] < third < margins[3]
    filters_of_another = f"filter=[{{method: safety_checker, model: {tmp_path / 'model'}, above: {third}}}]"
    result = run(path, filters_of_another)
    (strict,) = accounts(result).values()
    assert result.units == 0
    assert (strict.accepted, strict.rejected) == (3, {"safety_checker.margin": 1})
    assert listing(tmp_path / "out" / "scores") == scored


def test_a_checkpoint_without_a_checker_is_told_before_anything_is_made(tmp_path):
    path = config(tmp_path, **filters("safety_checker", model=str(tmp_path)))
    with pytest.raises(UserError, match="has no safety checker"):
        run(path)
    assert not (tmp_path / "out" / "parts").exists()
