"""`seedloom evaluate geometry`, small but whole: every arm, every figure, one line for a mistake."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.evaluate.geometry import (
    FULL,
    GROUPS,
    GUIDED,
    OTHER_STEPS,
    PAIRS,
    POINTS,
    REAL,
    adam_arms,
    arms,
    other_steps,
    tables,
)
from jobs.tangram.drawings import CLASSES
from pipeline.config import parse
from tests.small_build import seedloom  # noqa: F401  fixture

LOCAL = ("--runner", "local", "--quick")


@pytest.mark.timeout(600)
def test_every_arm_has_every_figure_and_a_second_run_builds_nothing(seedloom, tmp_path):  # noqa: F811
    command = ("evaluate", "geometry", *LOCAL, "--out", tmp_path, "--class", "circle", "--class", "gear")
    ended = seedloom(*command, "--inversion-steps", 3)
    assert ended.code == 0, ended.err
    rows = pq.read_table(tmp_path / "geometry.parquet").to_pylist()
    tables = {r["table"]: r["conditions"] for r in rows}
    assert "ddim, 2 inversion steps; 1 sampling steps; guidance 1" in tables["interpolation"]
    assert tables["inversion steps"].startswith("circle; ")
    assert "2 or 3 inversion steps" in tables["inversion steps"]

    found = {(r["table"], r["row"], r["metric"]): r for r in rows}
    measured = {"accuracy", "frechet_judge", "frechet_clip", "diversity"}
    combined = measured | {"norm", "ms", "ms_sd"}
    for table, row, metrics in (
        ("interpolation", "slerp", combined),
        ("interpolation", "cog", combined),
        ("interpolation", "the seeds themselves", combined),
        ("interpolation", GUIDED, combined),
        ("interpolation", "random noise", measured | {"norm"}),
        ("interpolation", REAL, measured),
        ("centroid", "cog", combined),
        ("centroid", REAL, measured),
        ("inversion steps", "slerp, 2 steps", combined),
        ("inversion steps", "slerp, 3 steps", combined),
    ):
        assert {m for t, r, m in found if (t, r) == (table, row)} == metrics, (table, row)
    judged = found["interpolation", "slerp", "frechet_judge"]
    assert (judged["n"], judged["dimensions"]) == (2 * POINTS, 256)
    assert found["interpolation", REAL, "accuracy"]["value"] > 0.8
    assert found["interpolation", "slerp", "norm"]["value"] == pytest.approx(
        found["interpolation", GUIDED, "norm"]["value"]
    )  # the same seeds, drawn otherwise

    differences = pq.read_table(tmp_path / "geometry_differences.parquet").to_pylist()
    assert {"cog", "random noise"} <= {d["row"] for d in differences if d["against"] == "slerp"}
    assert {d["verdict"] for d in differences} == {"not shown"}  # of so few images
    summary = (tmp_path / "geometry.txt").read_text()
    assert "256 features (n is smaller: biased)" in summary
    assert summary.splitlines()[-1].startswith("building: ")
    for name in ("paths", "centroids", "geometry"):
        assert Image.open(tmp_path / f"{name}.png").width > 600
    assert ended.out.splitlines()[-1] == str(tmp_path / "centroids.png")

    again = seedloom(*command, "--inversion-steps", 0)
    assert again.code == 0, again.err
    told = [line for line in again.err.splitlines() if line.startswith("[")]
    assert len(told) == 6
    assert all("nothing to do" in line for line in told)
    repeated = {
        (r["table"], r["row"], r["metric"]): r["value"]
        for r in pq.read_table(tmp_path / "geometry.parquet").to_pylist()
    }
    assert all(found[key]["value"] == value for key, value in repeated.items() if not key[2].startswith("ms"))


def test_the_whole_evaluation_has_every_method_of_the_papers(tmp_path):
    """Sizes, paired draws and shared seeds of the default, from its configs alone."""
    made = {a.name: a.config for a in arms(FULL, tmp_path, CLASSES, "ddim")}
    assert len(made) == len(PAIRS) + 1 + len(GROUPS)
    made |= {a.name: a.config for a in adam_arms(FULL, tmp_path, CLASSES[:6], "ddim")}
    more = other_steps(FULL, tmp_path, CLASSES[:6], "ddim", 400)
    assert [a.name for a in more] == [f"pairs at 400 steps: {name}" for name in OTHER_STEPS]
    inversions = set()
    for name, config in [*made.items(), *((a.name, a.config) for a in more)]:
        settings = parse({**config, "output": "out"}, name)  # every method and setting exists
        (target,) = settings.targets
        assert (target.attempts, settings.filter, settings.rng_seed) == (1, (), 0)
        expected = {"groups": 25, "few groups": 24}.get(name.split(":")[0], 30)
        assert sum(target.recipe.values()) == target.accepted == expected
        for recipe in settings.recipes.values():
            assert recipe.batch == 5  # seeds of one device batch are shared
            assert recipe.generate.guidance == (4 if GUIDED in name else 1)
            if recipe.combine is not None:
                inversions.add((recipe.invert.steps, recipe.invert.guidance))
                assert recipe.invert.steps == (400 if "400" in name else 50)
    assert inversions == {(50, 1), (400, 1)}

    names = [*made, *(a.name for a in more), f"pairs: {REAL}", f"groups: {REAL}"]
    compared = {table.name: table for table in tables(FULL, names, CLASSES[:6], "ddim", 400)}
    shown = {view.arm for table in compared.values() for view in table.rows.values()}
    assert shown == set(names)
    for table in compared.values():
        assert all(row in table.rows and other in table.rows for row, other in table.asked)
        assert {view.classes for view in table.rows.values()} <= {None, CLASSES[:6]}
    assert ("cog", "cog, equal angle") in compared["interpolation"].asked
    adam = compared["published optimiser, groups"].rows
    assert adam["nao"].recipes == ("group_3", "group_5", "group_10")
    assert adam["nao"].classes == CLASSES[:6]
    assert set(adam) == {"nao_adam", "normalized", "nao"}


MISTAKES = {
    "class": (["--class", "gryphon"], "--class 'gryphon': tangram has no such class; allowed: circle"),
    "runner": (["--runner", "slurm"], "run.runner: must be 'ray' or 'local', given 'slurm'"),
    "workers": (["--workers", "many"], "run.workers: must be auto, or a whole number from 1 up"),
    "inversion": (["--inversion", "nope"], "unknown invert method 'nope'; allowed:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_built(seedloom, tmp_path, mistake):  # noqa: F811
    options, line = MISTAKES[mistake]
    ended = seedloom("evaluate", "geometry", *LOCAL, "--out", tmp_path / "out", *options)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1, ended.err
    assert line in ended.err
    assert not (tmp_path / "out" / "builds").exists()
