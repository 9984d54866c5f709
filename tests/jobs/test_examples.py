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
    assert len(targets) == 4  # the rare classes of the references
    for target in targets.values():
        for recipe in target["recipes"].values():
            judged = recipe["accepted"] + sum(recipe["rejected"].values()) + recipe["surplus"]
            assert judged == recipe["candidates"] > 0  # none failed
    assert seedloom("verify", folder / "out", "--deep").code == 0
