"""`seedloom show --trajectory`: the numbers that reach the picture, and where its marks are."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageColor

from jobs.show.page import CAPTION, CELL, GAP, GREEN, MARGIN
from jobs.show.trajectory import Chosen, draw, gather
from pipeline.ledger import named, replan
from pipeline.store import Store
from tests.local_build import run
from tests.small_build import make_config, noise_recipe, sketch_recipe

RATIOS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def output(tmp_path_factory, drawings, tangram):
    """Four candidates of a pair, about half of them rejected, and a class by another recipe."""
    folder = tmp_path_factory.mktemp("trajectory")
    generate = {"method": "genie_ada", "steps": 4, "guidance": 1, "ratios": list(RATIOS)}
    targets = [
        {"pairs": [["gear", "circle"]], "accepted": 2, "recipe": "hard"},
        {"classes": ["ring"], "accepted": 1, "recipe": "plain"},
    ]
    recipes = {"hard": noise_recipe(generate=generate), "plain": sketch_recipe()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
        run(make_config(folder, drawings, recipes=recipes, targets=targets))
    return folder / "out"


def gathered(output, target, count):
    store = Store(str(output))
    return gather(store, replan(store, named(store).build_id), target, count)


def test_what_is_drawn_of_a_candidate_is_what_its_row_says(output, drawings):
    (first, second) = gathered(output, "gear -> circle", 2)
    store = Store(str(output))
    (stream,) = (s for s in replan(store, named(store).build_id).streams if s.target == "gear -> circle")
    rows = pq.read_table(output / "parts" / stream.id / "000000.parquet").to_pylist()
    origins = {r.sha256: r.origin for r in stream.sources}
    for shown, row in zip((first, second), rows, strict=False):
        assert (shown.key, shown.source_class, shown.ratios) == (row["key"], "gear", RATIOS)
        assert (list(shown.distances), shown.ratio) == (row["generate_trace"], row["noise_ratio"])
        assert np.array_equal(shown.image, Image.open(BytesIO(row["image"])))
        assert np.array_equal(shown.source, Image.open(drawings / origins[row["source"]]).convert("RGB"))
    assert first.key != second.key
    assert len(gathered(output, "gear -> circle", 99)) % 4 == 0  # rejected ones too: whole units


def candidate(ratio, distances=(-1.0, 0.0, 1.0, 3.0)):
    picture = Image.new("RGB", (64, 64), "white")
    return Chosen("key", "gear", picture, picture, (0.5, 0.6, 0.7, 0.8), distances, ratio)


def dot(row, others=()):
    """Where the mark of the chosen ratio is in the picture, of the first row."""
    top = MARGIN + CAPTION + GAP
    pixels = np.asarray(draw([row, *others]))[top - 6 : top + CELL]
    y, x = np.nonzero((pixels == ImageColor.getrgb(GREEN)).all(axis=2))
    return x.mean(), y.mean() - 6


def test_the_mark_is_at_the_chosen_ratio_and_its_distance():
    (x1, y1), (x2, y2), (x3, y3) = (dot(candidate(r)) for r in (0.6, 0.7, 0.8))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=1)  # ratios are a tenth apart
    assert y1 - y2 == pytest.approx((CELL - 1) / 4, abs=1)  # of 4 from the lowest to the highest
    assert y2 - y3 == pytest.approx((CELL - 1) / 2, abs=1)
    assert y3 == pytest.approx(0, abs=1)


def test_all_rows_are_drawn_on_one_scale():
    high = replace(candidate(0.6), distances=(-1.0, 0.0, 1.0, 7.0))
    assert dot(candidate(0.8), [high])[1] == pytest.approx((CELL - 1) / 2, abs=1)


def test_a_curve_that_goes_nowhere_can_be_drawn():
    assert dot(candidate(0.6, (0.0,) * 4))[0] > 0


def test_the_command_writes_a_row_for_each_candidate(seedloom, output, tmp_path):
    sizes = []
    for rows in (1, 2):
        out = tmp_path / f"{rows}.png"
        shown = seedloom("show", output, "--trajectory", "gear -> circle", "--rows", rows, "--out", out)
        assert shown.code == 0, shown.err
        with Image.open(out) as picture:
            sizes.append(picture.height - MARGIN)
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--trajectory", "ring"],
            "no recipe of this target chooses ratios (genie_ada does); targets of which",
        ),
        (["--trajectory", "rose"], "targets of which one does: gear -> circle"),
        (["--trajectory", "gear -> circle", "--subspace", "gear"], "are two pictures: give one of them"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(seedloom, output, options, line):
    ended = seedloom("show", output, *options)
    assert ended.code == 2
    assert line in ended.err
    assert ended.err.count("\n") == 1
