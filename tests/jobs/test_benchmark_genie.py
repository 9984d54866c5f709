"""The benchmark of GeNIe-Ada: what it counts, and that it prints what it measured on what."""

from __future__ import annotations

import json

import pytest
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks import genie as benchmark


@pytest.fixture
def facts(load_tiny):
    return benchmark.measure(load_tiny(), rows=2, runs=1, steps=50, guidance=1.0)


def test_calls_are_those_of_the_longest_ratio_or_of_all(facts):
    assert [case["ratios"] for case in facts["sets"]] == [[0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8, 0.9]]
    calls = [{name: way["calls"] for name, way in case["ways"].items()} for case in facts["sets"]]
    assert calls == [{"aligned": 40, "separate": 105}, {"aligned": 45, "separate": 175}]
    for case in facts["sets"]:
        assert {way["model_rows"] for way in case["ways"].values()} == {2 * case["ways"]["separate"]["calls"]}
        assert all(way["seconds"] > 0 for way in case["ways"].values())


def test_the_command_prints_figures_and_machine(load_tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("jobs.benchmarks.models.model", lambda *_: load_tiny())
    app = Typer()
    app.command()(benchmark.genie)
    out = tmp_path / "new" / "genie.json"
    done = CliRunner().invoke(app, ["--rows", "3", "--runs", "2", "--steps", "10", "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads(out.read_text())
    first = facts["sets"][0]["ways"]
    assert (first["aligned"]["calls"], first["separate"]["calls"]) == (8, 21)
    assert first["aligned"]["model_rows"] == first["separate"]["model_rows"] == 21 * 3 * 2  # guided
    for case in facts["sets"]:
        for way in case["ways"].values():
            assert way["fastest"] <= way["seconds"] <= way["slowest"]
            assert f"{way['seconds']:.3g}" in done.output
    assert facts["hardware"] in done.output
