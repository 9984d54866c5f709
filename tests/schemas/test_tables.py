from __future__ import annotations

import pyarrow as pa

from schemas import tables


def test_a_sample_has_every_column_of_its_part_but_the_image():
    samples = tables.samples(["clip_margin"])
    of_part_alone = {"index", "key", "status", "error", "image"}
    for field in tables.PART:
        if field.name not in of_part_alone:
            assert samples.field(field.name).equals(field)
    assert {"index", "key"} <= set(samples.names)
    assert "image" not in samples.names  # it lies in the tar


def test_what_every_candidate_has_may_not_be_null():
    assert not any(
        tables.PART.field(name).nullable for name in ("index", "key", "status", "prompt", "parents")
    )
    assert not tables.samples([]).field("offset").nullable


def test_scores_stand_in_one_order_and_are_float64():
    one, other = tables.samples(["b_x", "a_y"]), tables.samples(["a_y", "b_x"])
    assert one.equals(other)
    assert one.field("a_y").type == pa.float64()
    assert tables.scores(["margin"]).names == ["index", "margin"]


def test_score_names_hold_nothing_that_a_reader_would_take_apart():
    assert tables.score_name("clip", "margin") == "clip_margin"
    assert tables.score_name("my.package:Own", "margin") == "my_package_Own_margin"
    assert tables.score_name("clip_score", "clip_score") == "clip_score"
