"""The overhead benchmark: its arithmetic, and that both sides do the work that is counted."""

from __future__ import annotations

import json
import math

import pytest
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks.overhead import _ratio, describe, measure, overhead


def test_the_ratio_is_the_geometric_mean_over_pairs():
    ratio, low, high = _ratio(bare=[9.0, 10.0, 11.0], ray=[10.0, 10.0, 10.0])
    assert ratio == pytest.approx((0.9 * 1.0 * 1.1) ** (1 / 3))
    # Student's interval at 2 degrees of freedom: 4.3027 standard errors of the logarithms
    logs = [math.log(x) for x in (0.9, 1.0, 1.1)]
    error = math.sqrt(sum((x - sum(logs) / 3) ** 2 for x in logs) / 2 / 3)
    assert math.log(high / low) / 2 == pytest.approx(4.302653 * error)


def test_a_machine_that_slows_down_changes_nothing():
    ratio, low, high = _ratio(bare=[1.0, 2.0, 4.0], ray=[1.25, 2.5, 5.0])
    assert (ratio, low, high) == pytest.approx((0.8, 0.8, 0.8))


def test_every_combination_is_measured_printed_and_written(monkeypatch, tmp_path):
    facts = {
        "ratio": 0.97, "interval_95": [0.96, 0.98], "target": 0.95, "idle_share": 0.01, "turns": 2,
        "ray_images_per_second": 1.0, "bare_images_per_second": 1.0, "images_per_turn": 16, "batch": 8,
        "ray_seconds": [1.0], "bare_seconds": [1.0], "start_seconds": {"ray": 1, "bare": 1}, "restarts": 0,
        "retries": 0, "load_before": 0.0, "hardware": "a machine", "versions": {"ray": "2"},
    }  # fmt: skip
    monkeypatch.setattr(
        "jobs.benchmarks.overhead.measure",
        lambda _folder, _seconds, workers, _turns, steps, unit: {
            **facts, "workers": workers, "steps": steps, "unit": unit,
        },
    )  # fmt: skip
    app = Typer()
    app.command()(overhead)
    out = tmp_path / "overhead.json"

    def run(*arguments: str):
        done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
        assert done.exit_code == 0, done.output
        return json.loads(out.read_text()), done.output

    one, _ = run()
    assert (one["workers"], one["unit"]) == (0, 16)
    several, said = run("--workers", "1", "--workers", "2", "--unit", "16", "--unit", "64")
    assert [(c["workers"], c["unit"]) for c in several] == [(1, 16), (1, 64), (2, 16), (2, 64)]
    assert all(f"{c['workers']} workers, 20 steps, unit {c['unit']}, batch 8" in said for c in several)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("unit", [16, 64])
def test_both_sides_make_what_is_counted(tmp_path, unit):
    facts = measure(tmp_path, seconds=2, workers=1, turns=2, steps=1, unit=unit)
    assert facts["unit"] == unit
    parts = len(list((tmp_path / "out").glob("parts/*/*.parquet")))
    assert parts == 1 + facts["turns"] * facts["images_per_turn"] / facts["unit"]  # one to warm up
    total = facts["turns"] * facts["images_per_turn"]
    assert facts["ray_images_per_second"] == pytest.approx(total / sum(facts["ray_seconds"]), rel=0.01)
    assert facts["bare_images_per_second"] == pytest.approx(total / sum(facts["bare_seconds"]), rel=0.01)
    assert 0 <= facts["idle_share"] < 1
    assert f"Ray / bare: {facts['ratio']:.3f}" in describe(facts)
