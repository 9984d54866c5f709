"""The benchmark of NAO: its comparison in miniature, and when it says that a target was reached."""

from __future__ import annotations

import json

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks import nao as benchmark
from stages.combine import nao_adam
from stages.combine.nao import distance, nao_path


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(nao_adam, "STEPS", 30)


@pytest.fixture(scope="module")
def facts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nao_adam, "STEPS", 30)
        return benchmark.measure(2, 1, {3: 1}, 256)


def test_each_method_is_measured_on_the_curve_that_it_returns(facts):
    rng = torch.Generator().manual_seed(benchmark.SEED)
    z = torch.randn(2, 2, 1, 1, 256, generator=rng)
    assert [case["points"] for case in facts["paths"]] == [11, 50]
    methods = facts["paths"][0]["methods"]
    assert methods["exact"]["continuous"] == pytest.approx(float(distance(z[:, 0], z[:, 1]).mean()))
    sums = nao_adam.discrete_cost(nao_path(z[:, 0], z[:, 1], 11).double())
    assert methods["exact"]["discrete"] == pytest.approx(float(sums.mean()))
    assert methods["exact"]["continuous"] < methods["slerp"]["continuous"] < methods["lerp"]["continuous"]
    assert methods["adam"]["continuous"] > methods["exact"]["continuous"]
    for case in (*facts["paths"], *facts["centroids"]):
        assert case["methods"]["exact"]["off_span"] < 1e-10 < case["methods"]["adam"]["off_span"]
        assert case["worse"] == 0


def test_the_targets_are_judged_by_what_was_measured(facts):
    for line in facts["targets"]:
        assert line["reached"] == (line["measured"].startswith("worse in 0") or _times(line))
    assert len(facts["targets"]) == 4  # no worse, paths of 11 and of 50, centroids of 11

    slow = [{"points": 11, "pairs": 5, "worse": 1, "faster": 99.4}]
    lines = benchmark._targets(slow, [{"points": 11, "groups": 2, "worse": 0, "faster": 100.1}])
    assert [(line["measured"], line["reached"]) for line in lines] == [
        ("worse in 1 of 7 pairs and groups", False),
        ("99.4 times", False),
        ("100.1 times", True),
    ]


def _times(line):
    needed = int(line["target"].split("at least ")[1].split()[0])
    return float(line["measured"].split()[0].replace(",", "")) >= needed


def test_the_command_prints_a_table_and_writes_the_figures(few_steps, tmp_path):
    app = Typer()
    app.command()(benchmark.nao)
    out = tmp_path / "new" / "nao.json"
    done = CliRunner().invoke(app, ["--quick", "--d", "64", "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads(out.read_text())
    assert (facts["d"], facts["threads"], len(facts["paths"]), len(facts["centroids"])) == (64, 1, 1, 1)
    for text in ("paths, n = 11; pairs: 2", "centroids, k = 3; groups: 1", "never worse", facts["hardware"]):
        assert text in done.output
    for line in facts["targets"]:
        assert f"{line['measured']}: {'reached' if line['reached'] else 'MISSED'}" in done.output
