from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.errors import Damaged, UserError
from schemas.manifest import VERSION, Manifest, RecipeAccount, Shard, TargetAccount
from schemas.sealed import seal


def recipe_account(missing: int) -> RecipeAccount:
    return RecipeAccount(
        quota=4 + missing, accepted=4, candidates=9, rejected={"clip.margin": 3}, surplus=1, failed=1,
        missing=missing, exhausted=missing > 0,
    )  # fmt: skip


@pytest.fixture
def manifest() -> Manifest:
    recipes = {"plain": recipe_account(2), "seeds": recipe_account(0)}
    return Manifest(
        build_id="b" * 20,
        name="small",
        samples=8,
        classes=("gear", "ring"),
        targets={
            "ring": TargetAccount(
                label="ring", class_index=1, prompt="a ring", admitted=3, quarantined=1, recipes=recipes
            )
        },
        quarantined={"ring": 1},
        shards=(
            Shard(name="000000", rows=8, tar_bytes=9, tar_sha256="1", parquet_bytes=9, parquet_sha256="2"),
        ),
        files={"config.yaml": "3"},
        models={"backbone": "4"},
        environments=({"torch": "2"},),
    )


def test_it_comes_back(manifest):
    assert Manifest.from_bytes(manifest.to_bytes(), "x") == manifest


def test_shortfall_is_what_is_missing_over_all_recipes(manifest):
    assert manifest.shortfall == 2


def test_a_changed_byte_is_found(manifest):
    data = manifest.to_bytes()
    for at in range(0, len(data), 7):
        with pytest.raises(Damaged, match=r"out/manifest\.json"):
            Manifest.from_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "out/manifest.json")


def test_targets_of_an_older_format_are_classes(manifest):
    older = manifest.model_dump(mode="json") | {"version": 2}
    del older["targets"]["ring"]["label"]
    assert Manifest.from_bytes(seal(older), "x").targets == manifest.targets


def test_a_newer_format_is_refused_with_what_to_do(manifest):
    newer = seal(manifest.model_dump(mode="json") | {"version": VERSION + 1, "invented_later": 1})
    with pytest.raises(UserError, match=rf"newer seedloom \(format {VERSION + 1}\); upgrade"):
        Manifest.from_bytes(newer, "x")


def test_an_unknown_field_of_this_format_is_refused(manifest):
    with pytest.raises(ValidationError):
        Manifest.from_bytes(seal(manifest.model_dump(mode="json") | {"invented": 1}), "x")
