"""A pilot's forecast: its arithmetic, by simulation; and against the whole build."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from jobs.pilot import Measured, forecast, summed
from tests.small_build import listing, make_config

TARGETS = [{"classes": ["circle", "gear"], "accepted": 40, "attempts": 8}]


def stream(quota=40, unit=4, max_units=100):
    return SimpleNamespace(quota=quota, unit=unit, max_units=max_units)


def seen(candidates, passed, seconds=2.0):
    return Measured(candidates, passed, seconds, candidate_bytes=100, sample_bytes=50)


def found(rows, price=None):
    return summed([{"target": "t", "recipe": "r", **row} for row in rows], 10.0, price)


def test_half_of_the_candidates_pass():
    (row,) = found([forecast(stream(), seen(64, 32))], price=9)["rows"]
    assert row["rate"][0] == 0.5
    assert row["candidates"][0] == 80
    assert row["accepted"][0] == 40
    assert row["bytes"][0] == 80 * 100 + 40 * 50
    assert row["device_hours"][0] == pytest.approx(160 / 3600)
    assert row["cost"] == pytest.approx([h * 9 for h in row["device_hours"]])
    assert row["per_accepted"] == pytest.approx(
        {"candidates": 2, "device_seconds": 4, "bytes": 250, "cost": 0.01}
    )


def test_candidates_come_in_whole_units_and_no_more_than_attempts_allow():
    assert forecast(stream(quota=5, unit=4), seen(10, 10))["candidates"].middle == 8
    short = forecast(stream(quota=40, max_units=10), seen(100, 50))
    assert (short["candidates"].middle, short["accepted"].middle) == (40, 20)
    none = forecast(stream(), seen(64, 0))
    assert (none["candidates"].middle, none["accepted"].middle) == (400, 0)
    assert none["accepted"].high > 0
    assert found([none])["rows"][0]["per_accepted"]["candidates"] is None


def test_the_sum_has_what_is_done_once_and_no_time_without_a_record():
    rows = [forecast(stream(), seen(64, 32)), forecast(stream(), seen(64, 64))]
    whole = found(rows)["all"]
    assert whole["candidates"][0] == 120
    assert whole["device_hours"][0] == pytest.approx((120 * 2 + 10) / 3600)
    assert "cost" not in whole
    rows[0]["seconds"] = None
    assert found(rows, price=1)["all"]["device_hours"] is None


@pytest.mark.parametrize("rate", [0.15, 0.5, 0.9])
def test_the_interval_holds_what_a_build_takes_in_19_of_20_cases(rate):
    rng, inside, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        span = forecast(stream(max_units=1000), seen(64, int(rng.binomial(64, rate))))["candidates"]
        needed = 40 + rng.negative_binomial(40, rate)
        inside += span.low <= -(-needed // 4) * 4 <= span.high
    assert inside / runs >= 0.93  # 0.95 less two standard deviations of 400 cases


def test_the_forecast_agrees_with_the_whole_build(tmp_path, drawings, seedloom):
    path = make_config(tmp_path, drawings, targets=TARGETS)
    told = seedloom("plan", path, "--pilot", 32, "--json", "--set", "run.price_per_device_hour=2")
    assert told.code == 0, told.err
    pilot = json.loads(told.out)["pilot"]
    assert pilot["folder"] == str(tmp_path / "out" / "pilot")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pilot"]  # of the dataset nothing is made
    assert [row["pilot_candidates"] for row in pilot["rows"]] == [32, 32]
    assert pilot["all"]["cost"] == pytest.approx([2 * h for h in pilot["all"]["device_hours"]])

    assert seedloom("build", path).code == 0
    (folder,) = (tmp_path / "out" / "builds").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    size = {"parts": 0, "scores": 0}
    for kind in size:
        size[kind] = sum(p.stat().st_size for p in (tmp_path / "out" / kind).rglob("*.parquet"))
    shards = sum(s["tar_bytes"] + s["parquet_bytes"] for s in manifest["shards"])
    for row in pilot["rows"]:
        account = manifest["targets"][row["target"]]["recipes"][row["recipe"]]
        low, high = row["candidates"][1:]
        assert low <= account["candidates"] <= high
        assert account["accepted"] == row["accepted"][0] == 40
    middle, low, high = pilot["all"]["bytes"]
    assert low * 0.9 <= sum(size.values()) + shards <= high * 1.1
    assert low < middle < high
    # times of a small build on a machine that has other work: within a factor of four
    spent = sum(run["seconds"][step] for step in ("start", "invert", "assess", "prepare", "generate")) / 3600
    low, high = pilot["all"]["device_hours"][1:]
    assert low / 4 <= spent <= high * 4


def test_a_pilot_that_is_there_is_not_made_again(tmp_path, drawings, seedloom):
    path = make_config(tmp_path, drawings)
    first = json.loads(seedloom("plan", path, "--pilot", 4, "--json").out)
    before = listing(tmp_path / "out")
    assert json.loads(seedloom("plan", path, "--pilot", 4, "--json").out) == first
    assert listing(tmp_path / "out") == before


def test_without_a_price_there_is_no_cost(tmp_path, drawings, seedloom):
    path = make_config(tmp_path, drawings)
    told = seedloom("plan", path, "--pilot", 4)
    assert told.code == 0, told.err
    assert "device-hours" in told.out
    assert "cost" not in told.out
    assert "cost" in seedloom("plan", path, "--pilot", 4, "--set", "run.price_per_device_hour=2.5").out


def test_a_pilot_of_nothing_is_refused(tmp_path, drawings, seedloom):
    told = seedloom("plan", make_config(tmp_path, drawings), "--pilot", 0)
    assert told.code == 2
    assert "--pilot 0: allowed is a whole number from 1 up" in told.err
    assert not (tmp_path / "out").exists()
