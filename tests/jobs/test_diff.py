"""`seedloom diff`: samples that came, went and changed."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.diff import compare
from tests.local_build import config, run

pytestmark = pytest.mark.usefixtures("one_backbone")


def table(rows: dict[str, tuple[str, str]]) -> pa.Table:
    keys = sorted(rows)
    columns = {"key": keys, "class": [rows[k][0] for k in keys], "image_sha256": [rows[k][1] for k in keys]}
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def test_every_sample_is_counted_once():
    a = table({"1": ("cat", "x"), "2": ("cat", "y"), "3": ("dog", "z"), "4": ("dog", "w")})
    b = table({"2": ("cat", "y"), "3": ("dog", "other"), "4": ("cat", "w"), "5": ("dog", "v")})
    facts = compare(a, b)
    assert (facts["came"], facts["went"], facts["changed"], facts["same"]) == (["5"], ["1"], ["3", "4"], 1)
    assert facts["classes"] == {
        "cat": {"came": 0, "went": 1, "changed": 1, "same": 1},
        "dog": {"came": 1, "went": 0, "changed": 1, "same": 0},
    }
    back = compare(b, a)
    assert (back["came"], back["went"], back["changed"]) == (["1"], ["5"], ["3", "4"])


def test_nothing_beside_something():
    something, nothing = table({"1": ("cat", "x")}), table({})
    assert compare(nothing, something)["came"] == ["1"]
    assert compare(something, nothing)["went"] == ["1"]
    assert compare(something, something)["same"] == 1


def test_a_larger_quota_only_adds(tmp_path, seedloom):
    path = config(tmp_path, targets=[{"classes": ["circle", "gear"], "accepted": 4}])
    small = run(path)
    path = config(tmp_path, targets=[{"classes": ["circle", "gear"], "accepted": 7}])
    large = run(path)
    output = tmp_path / "out"
    ended = seedloom("diff", output / "builds" / small.manifest.build_id, output, "--json")
    facts = json.loads(ended.out)
    assert (len(facts["came"]), facts["went"], facts["changed"], facts["same"]) == (6, [], [], 8)
    keys = {
        build.manifest.build_id: {
            key
            for file in (output / build.folder / "shards").glob("*.parquet")
            for key in pq.read_table(file, columns=["key"])["key"].to_pylist()
        }
        for build in (small, large)
    }
    assert set(facts["came"]) == keys[large.manifest.build_id] - keys[small.manifest.build_id]
    said = seedloom("diff", output / "builds" / small.manifest.build_id, output).out
    assert "gear: 3 came, 0 went, 0 changed, 4 the same" in said
    assert seedloom("diff", output, output).out == "the same 14 samples\n"


def test_two_outputs_are_compared_as_well(tmp_path, seedloom):
    path = config(tmp_path, targets=[{"classes": ["circle"], "accepted": 4}])
    run(path)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert seedloom("diff", tmp_path / "out", tmp_path / "copy").out == "the same 4 samples\n"


@pytest.mark.parametrize("wrong", ["nowhere", "out/builds/0000"])
def test_what_is_no_build_is_one_line(tmp_path, seedloom, wrong):
    run(config(tmp_path, targets=[{"classes": ["circle"], "accepted": 4}]))
    ended = seedloom("diff", tmp_path / "out", tmp_path / wrong)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "no complete build" in ended.err
