"""Goals: which classes and pairs a config's targets ask for, and from whose images they are made."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.config import parse
from pipeline.goals import goals, settle
from pipeline.references import Lock
from schemas.errors import UserError
from schemas.records import Quarantined, Reference


def images(label, count):
    return tuple(Reference(f"{label}{n}", label, f"{label}/{n}.png", 64, 64) for n in range(count))


# three classes with images, of different number, and one of which no file could be used
LOCK = Lock(
    {label: images(label, n) for label, n in {"circle": 4, "gear": 2, "red_star": 3}.items()},
    (Quarantined("ring/0.png", "ring", "empty file", ""),),
)
GENIE = {"generate": "genie"}


def config(*targets, recipes=None, **changes):
    content = {
        "output": "-",
        "references": {"uri": "somewhere"},
        "recipes": recipes or {"hard": GENIE},
        "targets": [{"accepted": 1, **target} for target in targets],
    }
    return parse({**content, **changes}, "test")


def asked(*targets, lock=LOCK, **changes):
    """Goal → its sources."""
    return {goal.name: goal.sources for goal in goals(config(*targets, **changes), lock)}


def refused(*targets, lock=LOCK, **changes):
    with pytest.raises(UserError) as caught:
        goals(settle(config(*targets, **changes), lock), lock)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def matrix(path, rows):
    columns = ("class", "predicted", "share")
    pq.write_table(pa.table({n: [row[k] for row in rows] for k, n in enumerate(columns)}), path)
    return str(path)


def confused(path, count=1, **target):
    return {"classes": "all", "sources": {"most_confused": count, "matrix": str(path)}} | target


# --- classes and pairs ------------------------------------------------------------------------------------


def test_without_other_classes_images_nothing_is_asked_of_them():
    plain = {"plain": {"generate": "text_to_image"}}
    assert asked({"classes": "all"}, recipes=plain) == dict.fromkeys(
        ("circle", "gear", "red_star", "ring"), ()
    )
    assert asked({"classes": {"fewer_than": 3}}, recipes=plain) == {"gear": (), "ring": ()}
    assert list(asked({"classes": ["red_star", "gear"]}, recipes=plain)) == ["gear", "red_star"]


def test_unless_it_is_said_a_class_is_made_from_all_others_that_have_images():
    all_of = {"circle": ("gear", "red_star"), "gear": ("circle", "red_star")}
    assert asked({"classes": ["circle", "gear"]}) == all_of
    assert asked({"classes": ["circle", "gear"], "sources": "all"}) == all_of
    assert asked({"classes": ["ring"]}) == {"ring": ("circle", "gear", "red_star")}


def test_sources_are_a_list_for_every_class_or_a_list_for_each():
    assert asked({"classes": ["gear", "ring"], "sources": ["red_star", "circle", "circle"]}) == {
        "gear": ("circle", "red_star"),
        "ring": ("circle", "red_star"),
    }
    each = {"gear": ["circle"], "ring": ["red_star", "gear"], "circle": ["gear"]}
    assert asked({"classes": ["gear", "ring"], "sources": each}) == {
        "gear": ("circle",),
        "ring": ("gear", "red_star"),
    }


def test_each_pair_is_a_goal_of_its_own_beside_its_class():
    found = goals(
        config({"pairs": [["gear", "circle"], ["red_star", "circle"]]}, {"classes": ["circle"]}), LOCK
    )
    assert [(goal.name, goal.label, goal.sources) for goal in found] == [
        ("circle", "circle", ("gear", "red_star")),
        ("gear -> circle", "circle", ("gear",)),
        ("red_star -> circle", "circle", ("red_star",)),
    ]


def test_one_recipe_that_starts_from_other_classes_is_enough():
    recipes = {"hard": GENIE, "plain": {"generate": "text_to_image"}}
    both = {"classes": ["gear"], "recipe": {"hard": 1, "plain": 1}, "sources": ["circle"]}
    assert asked(both, recipes=recipes) == {"gear": ("circle",)}
    line = refused({**both, "recipe": "plain"}, recipes=recipes)
    assert line.startswith("targets.0.sources: no recipe of this target starts from images of another class")
    pairs = {"pairs": [["gear", "circle"]], "recipe": "plain"}
    assert refused(pairs, recipes=recipes).startswith("targets.0.pairs: no recipe of this target")
    own = {"own": {"generate": "image_to_image"}}
    assert "no recipe of this target" in refused({"classes": ["gear"], "sources": "all"}, recipes=own)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ({"pairs": [["gear", "gear"]]}, "targets.0.pairs: 'gear' is both source and target"),
        (
            {"pairs": [["rose", "gear"]]},
            "targets.0.pairs: no references of class 'rose'; classes there: circle",
        ),
        ({"pairs": [["gear", "rose"]]}, "targets.0.pairs: no references of class 'rose'"),
        (
            {"pairs": [["ring", "gear"]]},
            "targets.0.pairs: no usable references of 'ring', from which 'gear' is",
        ),
        ({"pairs": [["gear", "circle"]] * 2}, "targets.0: 'gear -> circle' is asked for twice"),
        ({"classes": ["gear", "gear"]}, "targets.0: 'gear' is asked for twice"),
        (
            {"classes": ["rose"]},
            "targets.0.classes: no references of class 'rose'; classes there: circle, gear",
        ),
        ({"classes": {"fewer_than": 1}, "sources": ["ring"]}, "targets.0.sources: 'ring' is both source and"),
        ({"classes": ["gear"], "sources": ["gear"]}, "targets.0.sources: 'gear' is both source and target"),
        ({"classes": ["gear"], "sources": ["rose"]}, "targets.0.sources: no references of class 'rose'"),
        ({"classes": ["gear"], "sources": ["ring"]}, "targets.0.sources: no usable references of 'ring'"),
        (
            {"classes": ["gear"], "sources": {"circle": ["gear"]}},
            "targets.0.sources: no sources for the class",
        ),
        (
            {"classes": ["gear"], "sources": {"gear": ["gear"]}},
            "targets.0.sources: 'gear' is both source and",
        ),
        (
            {"classes": ["gear"], "sources": {"gear": ["circle"], "gaer": ["circle"]}},
            "targets.0.sources: no references of class 'gaer'",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(target, line):
    assert refused(target).startswith(line)


def test_two_targets_may_not_ask_for_the_same():
    line = refused({"classes": ["circle"]}, {"classes": ["gear", "circle"]})
    assert line.startswith("targets.1: 'circle' is asked for twice")


def test_fewer_than_few_is_nobody():
    lock = Lock({"circle": images("circle", 4)})
    assert "no class has fewer than 3 references" in refused({"classes": {"fewer_than": 3}}, lock=lock)
    line = refused({"classes": "all"}, lock=lock)
    assert line.startswith(
        "targets.0.sources: 'circle' is made from images of other classes, and there are none"
    )


def test_without_references_there_are_no_sources():
    line = refused({"classes": ["gear"], "sources": ["circle"]}, lock=Lock(), references=None)
    assert line.startswith("targets.0.sources: no usable references of 'circle'")
    line = refused({"classes": ["gear"]}, lock=Lock(), references=None)
    assert "there are none" in line
    assert "needs `references` to know the classes" in refused(
        {"classes": "all"}, lock=Lock(), references=None
    )


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ({}, "targets.0: must name classes or pairs, one of the two"),
        ({"classes": "all", "pairs": [["a", "b"]]}, "targets.0: must name classes or pairs, one of the two"),
        ({"pairs": [["a", "b"]], "sources": "all"}, "targets.0: pairs name their sources themselves"),
        ({"pairs": []}, "targets.0.pairs: must be a list of [source, class] pairs, given []"),
        ({"pairs": [["a", "b", "c"]]}, "targets.0.pairs: must be a list of [source, class] pairs"),
        ({"classes": "all", "sources": "gear"}, "targets.0.sources: must be all, a list of classes, {CLASS:"),
        ({"classes": "all", "sources": {"gear": []}}, "targets.0.sources: must be all"),
        (
            {"classes": "all", "sources": {"most_confused": 0, "matrix": "m"}},
            "targets.0.sources: must be all, a list of classes, {CLASS: [source, …], …}, or {most",
        ),
    ],
)
def test_targets_that_say_nothing_clear_are_refused_by_the_config(target, line):
    with pytest.raises(UserError) as caught:
        config(target)
    assert str(caught.value).removeprefix("test: ").startswith(line)


# --- confusion matrices -----------------------------------------------------------------------------------


def chosen(path, count=1, **target):
    return settle(config(confused(path, count, **target)), LOCK).targets[0].sources


EVERY = {"classes": ["circle", "gear", "red_star"]}


def test_both_directions_decide_together(tmp_path):
    """A gear is taken for a circle more often than for a red star, but red stars are taken for gears."""
    path = matrix(
        tmp_path / "m",
        [
            ("gear", "gear", 0.5), ("gear", "circle", 0.3), ("gear", "red star", 0.2),
            ("circle", "circle", 0.98), ("circle", "red_star", 0.02),
            ("red star", "red star", 0.75), ("red star", "gear", 0.25),
        ],
    )  # fmt: skip
    assert chosen(path, **EVERY) == {"circle": ("gear",), "gear": ("red_star",), "red_star": ("gear",)}
    assert chosen(path, 2, classes=["gear"]) == {"gear": ("circle", "red_star")}
    assert chosen(path, 9, classes=["gear"]) == {"gear": ("circle", "red_star")}


def test_equal_shares_go_by_name(tmp_path):
    rows = [("gear", "red_star", 0.25), ("gear", "circle", 0.25), ("circle", "red_star", 0.125)]
    sources = chosen(matrix(tmp_path / "m", rows), **EVERY)
    assert sources == {"circle": ("gear",), "gear": ("circle",), "red_star": ("gear",)}
    assert chosen(matrix(tmp_path / "turned", rows[::-1]), **EVERY) == sources


def test_a_class_without_rows_of_its_own_is_confused_by_others_rows(tmp_path):
    path = matrix(tmp_path / "m", [("gear", "circle", 0.5)])
    assert chosen(path, classes=["circle", "gear"]) == {"circle": ("gear",), "gear": ("circle",)}


def test_rows_that_say_nothing_of_the_references_are_passed_over(tmp_path):
    rows = [
        ("gear", "tree", 0.9), ("tree", "gear", 0.9), ("gear", "ring", 0.9), ("gear", "gear", 0.99),
        ("gear", "red_star", None), ("gear", "red_star", float("nan")), ("gear", "red_star", 0.0),
        ("gear", None, 0.9), ("gear", "circle", 0.01),
    ]  # fmt: skip
    assert chosen(matrix(tmp_path / "m", rows), 5, classes=["gear"]) == {"gear": ("circle",)}


def test_only_classes_of_the_target_are_settled(tmp_path):
    """What a matrix says of others must not change the build."""
    rows = [("gear", "circle", 0.5), ("red_star", "circle", 0.1)]
    assert chosen(matrix(tmp_path / "m", rows), classes=["gear"]) == {"gear": ("circle",)}


def test_a_class_that_is_never_confused_is_named(tmp_path):
    path = matrix(tmp_path / "m", [("gear", "circle", 0.5)])
    line = refused(confused(path))
    assert line.startswith(f"targets.0.sources.matrix: {path!r} confuses 'red_star' with no other class")


def test_a_settled_config_needs_the_matrix_no_more(tmp_path):
    path = tmp_path / "m"
    matrix(path, [("gear", "circle", 0.5), ("red_star", "gear", 0.1)])
    wanted = {"circle": ("gear",), "gear": ("circle",), "red_star": ("gear",)}
    settled = settle(config(confused(path, **EVERY)), LOCK)
    path.unlink()
    kept = yaml.safe_dump(settled.described())
    assert str(path) not in kept
    content = yaml.safe_load(kept)
    content["references"]["uri"] = "somewhere"
    again = parse({**content, "output": "-"}, "kept")
    for one in (settled, again, settle(again, LOCK)):
        assert {goal.name: goal.sources for goal in goals(one, LOCK)} == wanted
    assert again.described() == settled.described()


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"class": ["gear"], "share": [1.0]}, "predicted"),
        ({"class": ["gear"], "predicted": ["circle"], "share": ["much"]}, "much"),
        (None, "parquet|Parquet|magic"),
    ],
)
def test_a_matrix_that_is_none_is_refused_in_one_line(tmp_path, columns, reason):
    path = tmp_path / "m"
    path.write_text("class,predicted,share\n") if columns is None else pq.write_table(pa.table(columns), path)
    line = refused(confused(path))
    begin = (
        f"targets.0.sources.matrix: {str(path)!r} cannot be read as Parquet with the columns class, predicted"
    )
    assert line.startswith(begin)
    assert any(word in line for word in reason.split("|"))
    assert line.endswith("`seedloom evaluate confusion` writes one")


def test_a_matrix_that_is_missing_is_refused_in_one_line(tmp_path):
    assert "No such file" in refused(confused(tmp_path / "m"))
