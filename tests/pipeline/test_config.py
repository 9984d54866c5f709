"""A config that is read, overridden, refused; what the command line makes of it is in tests/jobs."""

from __future__ import annotations

import json

import pytest
import yaml

from pipeline.config import BuildConfig, load, parse
from schemas.errors import UserError
from tests.small_build import make_config, noise_recipe

SHORTEST = {"output": "out", "targets": [{"classes": ["star"], "accepted": 4}]}


def test_the_shortest_config_has_defaults_that_work():
    config = parse(SHORTEST, "x")
    (recipe,) = config.recipes.values()
    assert recipe.combine.method == "cog"
    assert recipe.invert.method == "fixed_point"
    assert config.shares(config.targets[0]) == {"default": 1.0}


def test_a_method_may_be_named_alone():
    short = parse(SHORTEST | {"recipes": {"a": {"combine": "slerp"}}, "filter": ["clip"]}, "x")
    long = parse(
        SHORTEST | {"recipes": {"a": {"combine": {"method": "slerp"}}}, "filter": [{"method": "clip"}]}, "x"
    )
    assert short == long


def test_a_users_own_class_brings_its_own_settings():
    config = parse(SHORTEST | {"filter": [{"method": "tests.small_build:HashFilter", "least": 0.25}]}, "x")
    assert config.filter[0].least == 0.25


def test_a_config_comes_back_from_its_own_description():
    given = SHORTEST | {
        "references": {"uri": "somewhere", "names": {"star": "red star"}},
        "recipes": {"a": {"combine": "cog"}, "b": noise_recipe(filter=["classifier"])},
        "targets": [{"classes": {"fewer_than": 3}, "accepted": 4, "recipe": {"a": 1, "b": 0.5}}],
        "filter": ["clip"],
    }
    config = parse(given, "x")
    again = parse(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "x")
    assert again == config


def test_what_a_build_is_does_not_depend_on_where_and_how_it_is_made():
    elsewhere = SHORTEST | {"output": "s3://other", "run": {"runner": "local", "workers": 7}}
    referring = {"references": {"uri": "here"}}
    assert parse(elsewhere, "x").described() == parse(SHORTEST, "x").described()
    moved = {"references": {"uri": "there", "lock": "a" * 20}}
    assert parse(SHORTEST | referring, "x").described() == parse(SHORTEST | moved, "x").described()
    assert parse(SHORTEST | {"rng_seed": 1}, "x").described() != parse(SHORTEST, "x").described()


def test_filters_of_a_target_replace_those_of_its_recipe_and_of_the_build():
    def methods(target: dict, recipe: dict) -> list[str]:
        content = SHORTEST | {"filter": ["clip"], "recipes": {"a": noise_recipe(**recipe)}}
        content["targets"] = [SHORTEST["targets"][0] | target]
        config = parse(content, "x")
        return [f.method for f in config.filters(config.targets[0], "a")]

    assert methods({}, {}) == ["clip"]
    assert methods({}, {"filter": ["classifier"]}) == ["classifier"]
    assert methods({"filter": []}, {"filter": ["classifier"]}) == []


def test_overrides_reach_into_mappings_and_lists(tmp_path):
    path = make_config(tmp_path)
    settings = [
        "rng_seed=9", "targets.0.accepted=3", "recipes.plain.generate.steps=2", "shard.image=png",
        "backbone.dtype=bfloat16", "prompt=a {class}", "filter=[clip]",
    ]  # fmt: skip
    config = load(path, settings)
    assert config.rng_seed == 9
    assert config.targets[0].accepted == 3
    assert config.recipes["plain"].generate.steps == 2
    assert config.shard.image == "png"
    assert config.backbone.dtype == "bfloat16"
    assert [f.method for f in config.filter] == ["clip"]


def test_an_override_sets_the_last_key_of_its_path_and_no_other(tmp_path):
    """Also where two keys of the path are equal."""
    path = make_config(tmp_path, recipes={"x": noise_recipe()})
    with pytest.raises(UserError, match=r"recipes\.x: unknown key 'x'"):
        load(path, ["recipes.x.x=1"])
    assert load(path, ["recipes.x.unit=2"]).recipes["x"].unit == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rng_seed", r"expected key\.path=value"),
        ("=3", r"expected key\.path=value"),
        ("shard..samples=3", r"expected key\.path=value"),
        ("rng_seed=[", "not valid YAML"),
        ("rng_seed.x=3", r"there is no 'rng_seed\.x' in the config"),
        ("targets.5.accepted=1", r"there is no 'targets\.5\.accepted'"),
        ("targets.first.accepted=1", r"there is no 'targets\.first\.accepted'"),
        ("recipies.a.unit=1", "unknown key 'recipies'"),
    ],
)
def test_an_override_that_leads_nowhere(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load(make_config(tmp_path), [override])
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_named_in_one_line():
    with pytest.raises(UserError) as caught:
        parse({"targets": [{"classes": "all", "accepted": 0}], "rng_seed": "x"}, "dataset.yaml")
    message = str(caught.value)
    assert message.startswith("dataset.yaml: ")
    assert all(
        part in message for part in ("output: is missing", "rng_seed: must be a", "targets.0.accepted")
    )
    assert "\n" not in message


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(UserError) as caught:
        parse(SHORTEST | {"rng_seed": "y" * 5000}, "x")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("target", [{"accepted": True}, {"attempts": False}])
def test_yes_is_no_number(target):
    with pytest.raises(UserError, match=r"must be a number, given (True|False)"):
        parse(SHORTEST | {"targets": [SHORTEST["targets"][0] | target]}, "x")


def test_the_schema_is_as_strict_as_the_reader():
    jsonschema = pytest.importorskip("jsonschema")
    schema = BuildConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    accepts = jsonschema.Draft202012Validator(schema).is_valid
    own = {"method": "my.module:Filter", "anything": 1}
    references = {"uri": "x"}  # imagefolder is the default
    assert accepts(json.loads(json.dumps(SHORTEST)))
    assert accepts(SHORTEST | {"filter": ["clip", own, "my.module:Other"], "references": references})
    for change in (
        {"recipies": {}},
        {"filter": ["klip"]},
        {"filter": [{"margin": 0.1}]},
        {"filter": [{"method": "clip", "margin": "much"}]},
        {"filter": [5]},
        {"recipes": {"a": {"combine": "slurp"}}},
        {"references": {"kind": "imagefolder", "url": "x"}},
        {"targets": []},
        {"targets": [{"classes": "some", "accepted": 1}]},
    ):
        assert not accepts(SHORTEST | change), change
