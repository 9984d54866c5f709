"""The benchmark of shards: what it calls equal is equal, and what it reads back is what it wrote."""

from __future__ import annotations

import pytest

from jobs.benchmarks import shards as benchmark


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return benchmark.measure(20, 64, 1, tmp_path_factory.mktemp("shards"))


def test_equal_quality_is_that_of_webdatasets_defaults_and_no_more_than_it_takes(facts):
    ways = facts["ways"]
    assert ways[benchmark.EQUAL]["psnr"] >= ways[benchmark.THEIRS]["psnr"] - 0.2
    assert (
        ways[benchmark.OURS]["psnr"] >= ways[benchmark.EQUAL]["psnr"]
        or facts["quality"][benchmark.EQUAL] > 95
    )
    assert 50 <= facts["quality"][benchmark.EQUAL] <= 100


def test_figures_belong_together(facts):
    for way in facts["ways"].values():
        assert way["samples_per_second"] == pytest.approx(20 / way["seconds"])
        assert way["bytes"] > 20 * 3 * 512  # header, image and text of each
    packing = facts["packing"]
    assert packing["bytes"] > facts["ways"][benchmark.OURS]["bytes"] / 2
    assert packing["megabytes_per_second"] == pytest.approx(packing["bytes"] / packing["seconds"] / 1e6)
    text = benchmark.describe(facts)
    for name in (benchmark.OURS, benchmark.EQUAL, benchmark.THEIRS):
        assert f"| {name} |" in text
    assert facts["hardware"] in text


def test_pictures_are_no_two_alike():
    pictures = benchmark.photographs(12, 32)
    assert len({p.tobytes() for p in pictures}) == 12
    assert all(p.shape == (32, 32, 3) for p in pictures)
