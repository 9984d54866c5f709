"""The overhead benchmark: its arithmetic, and that both sides do the work that is counted."""

from __future__ import annotations

import math

import pytest

from jobs.benchmarks.overhead import _ratio, describe, measure


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_sides_make_what_is_counted(tmp_path):
    facts = measure(tmp_path, seconds=2, workers=1, turns=2, steps=1)
    parts = len(list((tmp_path / "out").glob("parts/*/*.parquet")))
    assert parts == 1 + facts["turns"] * facts["images_per_turn"] / facts["unit"]  # one to warm up
    total = facts["turns"] * facts["images_per_turn"]
    assert facts["ray_images_per_second"] == pytest.approx(total / sum(facts["ray_seconds"]), rel=0.01)
    assert facts["bare_images_per_second"] == pytest.approx(total / sum(facts["bare_seconds"]), rel=0.01)
    assert 0 <= facts["idle_share"] < 1
    assert f"Ray / bare: {facts['ratio']:.3f}" in describe(facts)
