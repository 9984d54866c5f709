"""The example configs are what a new user starts from: each is valid, and builds when it is made small."""

from __future__ import annotations

from importlib.resources import files

import pytest
import yaml

from jobs.init import TEMPLATES
from pipeline.config import load

# Fewer steps and images; everything that the example shows stays as it is.
SMALLER = {
    "few_shot": [
        "recipes.interpolate.invert.steps=2",
        "recipes.interpolate.generate.steps=2",
        "recipes.interpolate.unit=4",
        "recipes.interpolate.batch=2",
        "targets.0.accepted=2",
        "targets.0.attempts=2",
    ],
    "long_tail": [
        "recipes.refined.refine.iterations=1",
        "recipes.refined.invert.steps=2",
        "recipes.refined.generate.steps=3",
        "recipes.refined.unit=2",
        "recipes.refined.batch=2",
        "recipes.centroid.invert={method: ddim, steps: 2}",
        "recipes.centroid.generate.steps=2",
        "recipes.centroid.unit=2",
        "recipes.centroid.batch=2",
        "targets.0.accepted=2",
        "targets.0.attempts=1",
    ],
    "hard_negatives": [
        "recipes.adaptive.generate.steps=10",
        "recipes.fixed.generate.steps=10",
        "targets.0.accepted=2",
        "targets.0.attempts=1",
        "targets.1.accepted=1",
        "targets.1.attempts=1",
    ],
    "minority": [
        "recipes.unlikely.generate.steps=4",
        "recipes.varied.generate.steps=4",
        "measure.1.steps=2",
        "targets.0.accepted=2",
        "targets.0.attempts=1",
    ],
    "rare_concepts": [
        "recipes.nao_seedselect.invert.steps=3",
        "recipes.nao_seedselect.refine.iterations=1",
        "recipes.nao_seedselect.generate.steps=3",
        "targets.0.accepted=2",
        "targets.0.attempts=1",
    ],
    "mixed": [
        "recipes.seeds.invert.steps=3",
        "recipes.seeds.refine.iterations=1",
        "recipes.seeds.generate.steps=3",
        "recipes.seeds.unit=2",
        "recipes.seeds.batch=2",
        "recipes.negatives.generate.steps=10",
        "recipes.negatives.unit=2",
        "recipes.negatives.batch=2",
        "recipes.unlikely.generate.steps=4",
        "recipes.unlikely.unit=2",
        "recipes.unlikely.batch=2",
        "targets.0.accepted=3",
        "targets.0.attempts=1",
        "targets.0.recipe={seeds: 0.4, negatives: 0.3, unlikely: 0.3}",  # so that 3 images have one of each
    ],
}


def test_every_example_is_a_template_and_the_other_way_round():
    names = {entry.name.removesuffix(".yaml") for entry in files("jobs").joinpath("configs").iterdir()}
    assert names == set(TEMPLATES) == set(SMALLER)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_builds_from_what_init_writes(name, tmp_path, seedloom):
    folder = tmp_path / name
    assert seedloom("init", folder, "--template", name).code == 0
    config = folder / "dataset.yaml"
    assert load(config).targets == load(files("jobs").joinpath(f"configs/{name}.yaml")).targets

    settings = [argument for setting in SMALLER[name] for argument in ("--set", setting)]
    ended = seedloom("build", config, "--runner", "local", *settings)
    # so few steps may not pass the filters of the example: short of the quota is an honest end
    assert ended.code in (0, 3), ended.err

    manifest = next((folder / "out" / "builds").glob("*/manifest.json"))
    targets = yaml.safe_load(manifest.read_text())["targets"]
    assert (
        len(targets) == 4
    )  # the rare classes of the references; of hard_negatives, two pairs and two classes
    for target in targets.values():
        for recipe in target["recipes"].values():
            judged = recipe["accepted"] + sum(recipe["rejected"].values()) + recipe["surplus"]
            assert judged == recipe["candidates"] > 0  # none failed
    assert seedloom("verify", folder / "out", "--deep").code == 0
