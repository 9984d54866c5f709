"""A build in which two methods draw with one learned word: it is learned once, and every row names it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from stages.generate import textual_inversion
from tests.local_build import config, rows, run
from tests.small_build import listing, noise_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")

TOKEN = {"steps": 2, "batch": 1, "placeholder": "<new>"}


@pytest.fixture
def learnings(monkeypatch):
    """The number of references of every word that is learned while the test runs."""
    counts = []

    def learn(backbone, image_N3hw, settings, rng, learn=textual_inversion.learn_token):
        counts.append(len(image_N3hw))
        return learn(backbone, image_N3hw, settings, rng)

    monkeypatch.setattr(textual_inversion, "learn_token", learn)
    return counts


def test_one_word_is_learned_for_all_methods_of_a_class_and_kept(tmp_path, references, learnings):
    recipes = {
        "word": noise_recipe(
            generate={"method": "textual_inversion", "token": TOKEN, "steps": 1, "guidance": 1}
        ),
        "redrawn": noise_recipe(generate={"method": "da_fusion", "token": TOKEN, "steps": 4, "guidance": 1}),
    }
    targets = [{"classes": ["gear"], "accepted": 4, "recipe": {"word": 1, "redrawn": 1}}]
    path = config(tmp_path, references, recipes=recipes, targets=targets, filter=[])
    first = run(path)
    assert first.manifest.samples == 4
    assert learnings == [4]
    (file,) = (tmp_path / "out" / "artifacts").rglob("*.safetensors")
    made = load_file(file)
    assert (made["word_D"].shape, made["losses_S"].shape) == ((128,), (2,))

    samples = rows(tmp_path / "out", "builds")
    assert {tuple(row["artifacts"]) for row in samples} == {(file.parent.name,)}
    assert {row["prompt"] for row in samples} == {"a photo of a <new>"}
    ratios = {row["recipe"]: row["noise_ratio"] for row in samples}
    assert ratios["word"] is None
    assert ratios["redrawn"] in (0.25, 0.5, 0.75, 1.0)

    before = listing(tmp_path / "out" / "artifacts")
    assert not run(path).made
    assert run(path, "recipes.word.generate.steps=2").made  # other images of the same word
    assert learnings == [4]
    assert listing(tmp_path / "out" / "artifacts") == before

    run(path, "recipes.word.generate.token.lr=0.01")  # another word, of one of the two methods
    assert learnings == [4, 4]
    assert len(list((tmp_path / "out" / "artifacts").rglob("*.safetensors"))) == 2
