"""`batch: auto`: what fits is found once, kept, and from then on is a setting like any other."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.batches import largest, sizes
from pipeline.build import resolve
from pipeline.config import load
from schemas.errors import UserError
from tests.local_build import config, fresh, packed, run
from tests.small_build import Sketch, listing, parts_of, seeds_recipe, shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")

ONE = {"targets": [{"classes": ["circle"], "accepted": 6}]}


@pytest.fixture
def room(monkeypatch):
    """A device with room for so many rows at once: `room(3)`; returns the sizes of the calls."""
    draw = Sketch.__call__
    calls: list[int] = []

    def start(rows: int) -> list[int]:
        def call(self, backbone, models, order):
            calls.append(len(order.z_BCHW))
            if len(order.z_BCHW) > rows:
                raise torch.cuda.OutOfMemoryError("no more")
            return draw(self, backbone, models, order)

        monkeypatch.setattr(Sketch, "__call__", call)
        return calls

    return start


def auto(tmp_path, unit: int = 8, **changes):
    return config(tmp_path, recipes={"plain": sketch_recipe(unit=unit, batch="auto")}, **ONE, **changes)


def answers(tmp_path):
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("artifacts/*/batch.json")]
    return {answer["recipe"]: answer["batch"] for answer in found}


def test_the_largest_batch_that_runs_is_kept_and_named_it_gives_the_same_dataset(tmp_path, room):
    calls = room(3)
    path = auto(tmp_path)
    result = run(path)
    assert calls[:3] == [8, 4, 2]  # tried from the largest; 2 is the first that runs
    assert set(calls[3:]) == {2}
    assert answers(tmp_path) == {"plain": 2}
    named, parts = fresh(tmp_path, path, "recipes.plain.batch=2")
    assert named.manifest == result.manifest
    assert parts == parts_of(tmp_path / "out")


def test_an_answer_is_kept_for_later_builds_whatever_room_there_is(tmp_path, room):
    room(3)
    run(auto(tmp_path))
    calls = room(100)
    calls.clear()
    more = auto(tmp_path / "again", output=str(tmp_path / "out"), rng_seed=7)
    before = listing(tmp_path / "out" / "artifacts")
    assert run(more).made
    assert set(calls) == {2}
    assert listing(tmp_path / "out" / "artifacts") == before


def test_a_cpu_is_asked_for_no_more_than_eight(tmp_path, room):
    calls = room(100)
    run(auto(tmp_path, unit=24))
    assert answers(tmp_path) == {"plain": 8}
    assert set(calls) == {8}


def test_nothing_is_committed_where_not_even_one_runs(tmp_path, room):
    room(0)
    with pytest.raises(UserError, match="out of memory at batch 1; use a device with more memory"):
        run(auto(tmp_path))
    assert answers(tmp_path) == {}
    assert parts_of(tmp_path / "out") == set()


def test_an_error_of_another_kind_is_not_taken_for_lack_of_memory(tmp_path, monkeypatch):
    def call(self, backbone, models, order):
        raise RuntimeError("broken")

    monkeypatch.setattr(Sketch, "__call__", call)
    with pytest.raises(RuntimeError, match="broken"):
        run(auto(tmp_path))
    assert answers(tmp_path) == {}


def test_each_recipe_has_its_own_answer_and_one_that_names_its_batch_none(tmp_path):
    recipes = {
        "small": sketch_recipe(unit=4, batch="auto"),
        "odd": sketch_recipe(unit=9, batch="auto"),
        "named": sketch_recipe(unit=6, batch=3),
    }
    targets = [{"classes": ["circle"], "accepted": 6, "recipe": dict.fromkeys(recipes, 1)}]
    path = config(tmp_path, recipes=recipes, targets=targets)
    run(path)
    assert answers(tmp_path) == {"small": 4, "odd": 3}
    assert {s.recipe: s.batch for s in resolve(load(path, ()))[1].streams} == {
        "small": 4,
        "odd": 3,
        "named": 3,
    }


def test_seeds_and_a_refinement_are_tried_too_and_learn_once(tmp_path, references, monkeypatch):
    """The trial needs seeds and artifacts, and the artifact that it makes is the one that the build uses."""
    from stages.refine.seedselect import SeedSelect

    learned = []
    prepare = SeedSelect.prepare
    monkeypatch.setattr(
        SeedSelect, "prepare", lambda self, *given: learned.append(1) or prepare(self, *given)
    )
    refine = {"method": "seedselect", "iterations": 1, "gradient": "one_step"}
    generate = {"method": "text_to_image", "steps": 3, "guidance": 1}
    recipe = seeds_recipe(generate=generate, refine=refine, unit=2, batch="auto")
    path = config(tmp_path, references, recipes={"mixed": recipe}, filter=[],
                  targets=[{"classes": ["circle"], "accepted": 2}])  # fmt: skip
    auto_made = run(path)
    assert answers(tmp_path) == {"mixed": 2}
    assert len(learned) == 1
    named, _ = fresh(tmp_path, path, "recipes.mixed.batch=2")
    assert shard_hashes(named.manifest) == shard_hashes(auto_made.manifest)


def test_before_the_answer_a_plan_says_so_and_packing_finds_nothing(tmp_path, seedloom):
    path = auto(tmp_path)
    ended = seedloom("plan", path)
    assert ended.code == 0
    assert "recipe plain: batch auto is chosen when the build starts" in " ".join(ended.out.split())
    assert packed(path) == {"circle": 6}
    assert not (tmp_path / "out").exists()
    run(path)
    assert "batch auto" not in seedloom("plan", path).out


@pytest.mark.parametrize(("unit", "device", "wanted"), [
    (16, "cpu", [8, 4, 2, 1]), (16, "cuda", [16, 8, 4, 2, 1]), (12, "cpu", [6, 4, 3, 2, 1]),
    (128, "cuda", [64, 32, 16, 8, 4, 2, 1]), (7, "cpu", [7, 1]), (1, "cpu", [1]),
])  # fmt: skip
def test_sizes_divide_the_unit(unit, device, wanted):
    assert list(sizes(unit, device)) == wanted


def test_nothing_smaller_is_tried_than_what_runs():
    tried = []
    assert largest(iter([8, 4, 2, 1]), lambda size: tried.append(size) or size <= 4) == 4
    assert tried == [8, 4]
    assert largest(iter([2, 1]), lambda size: False) is None


@pytest.mark.parametrize("given", [0, -1, "all", 1.5])
def test_what_is_no_batch_is_refused_in_one_line(tmp_path, seedloom, given):
    ended = seedloom("plan", config(tmp_path, recipes={"plain": sketch_recipe(batch=given)}, **ONE))
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "recipes.plain.batch" in ended.err
    assert "auto, or a whole number from 1 up" in ended.err
