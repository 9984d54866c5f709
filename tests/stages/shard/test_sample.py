import json

import pytest

from stages.shard import sample


@pytest.mark.parametrize(("file_format", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_members_of_a_sample(file_format, extension):
    recipe = {"z": 1, "class": "Zürich tram", "scores": [0.5, 1.0], "deep": {"a": True}}
    members = sample.members("a/0001", b"\xff\xd8\0image", file_format, 12, "a photo of a tram ☃", recipe)
    assert members[f"a/0001.{extension}"] == b"\xff\xd8\0image"
    assert members["a/0001.cls"] == b"12"
    assert members["a/0001.txt"].decode() == "a photo of a tram ☃"
    assert json.loads(members["a/0001.json"]) == recipe
    assert len(members) == 4


def test_the_recipe_is_canonical():
    one = sample.members("k", b"", "png", 0, "", {"b": 1, "a": {"d": 1, "c": 2}})
    two = sample.members("k", b"", "png", 0, "", {"a": {"c": 2, "d": 1}, "b": 1})
    assert one == two


@pytest.mark.parametrize("value", [None, [], {}, (), {"deep": None}, [1, None], [[]]])
def test_a_value_without_a_type_is_refused(value):
    with pytest.raises(ValueError, match=r"recipe\.score.* a reader cannot tell its type"):
        sample.members("k", b"", "png", 0, "", {"score": value})


@pytest.mark.parametrize("value", [0, 0.0, False, ""])
def test_a_zero_is_a_value(value):
    assert json.loads(sample.members("k", b"", "png", 0, "", {"score": value})["k.json"]) == {"score": value}
