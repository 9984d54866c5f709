"""One build for all tests of this folder, to be read only: three classes, two recipes, uneven shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.local_build import run
from tests.small_build import drawings, make_config, seedloom, seeds_recipe, sketch_recipe  # noqa: F401

PER_CLASS = 13  # accepted; 39 samples in shards of 5


@pytest.fixture(scope="session")
def built(drawings, tangram, tmp_path_factory) -> Path:  # noqa: F811
    """The output of the build; its four references of each class are kept."""
    path = make_config(
        tmp_path_factory.mktemp("train"),
        drawings,
        recipes={"mixed": seeds_recipe(), "plain": sketch_recipe()},
        targets=[
            {
                "classes": ["circle", "gear", "ring"],
                "accepted": PER_CLASS,
                "attempts": 6,
                "recipe": {"mixed": 0.5, "plain": 0.5},
            }
        ],
        shard={"samples": 5, "window": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
        result = run(path)
    assert [shard.rows for shard in result.manifest.shards] == [5] * 7 + [4]
    return path.parent / "out"


@pytest.fixture
def own(built, tmp_path) -> Path:
    """The same, the test's own to damage."""
    return shutil.copytree(built, tmp_path / "own")
