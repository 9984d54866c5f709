"""`seedloom status`: what the store alone tells of builds that are complete, under way, or were left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import Interrupted
from tests.local_build import HASH, config, run
from tests.ray_build import await_that, small_config
from tests.small_build import Sketch

pytestmark = pytest.mark.usefixtures("one_backbone")

ROOT = Path(__file__).parents[2]


def facts(seedloom, output) -> dict:
    return json.loads(seedloom("status", output, "--json").out)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A build that was stopped in its fourth device batch: two units of one class are there."""
    targets = [{"classes": ["circle"], "accepted": 12}]
    path = config(tmp_path, filter=[{"method": HASH, "least": 0.2}], targets=targets)
    draw, calls = Sketch.__call__, []

    def call(self, backbone, models, order):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, backbone, models, order)

    with monkeypatch.context() as patch:
        patch.setattr(Sketch, "__call__", call)
        with pytest.raises(Interrupted):
            run(path)
    return path


def test_an_unfinished_build_says_how_far_it_is(stopped, seedloom):
    output = stopped.parent / "out"
    (found,) = facts(seedloom, output)["unfinished"].values()
    assert found["at_work"] is None
    counts = found["targets"]["circle"]
    assert counts["quota"] == 12
    assert counts["accepted"] + counts["rejected"] + counts["failed"] == 8
    said = seedloom("status", output).out
    assert f"circle: {counts['accepted']} accepted of 12" in said
    assert "nobody is at work" in said
    made = run(stopped).manifest
    later = facts(seedloom, output)
    assert later["unfinished"] == {}
    assert later["manifest"]["build_id"] == made.build_id


def test_one_that_has_other_models_says_so(stopped, seedloom, monkeypatch):
    monkeypatch.setattr("pipeline.plan.backbone_fingerprint", lambda settings: "another")
    (found,) = facts(seedloom, stopped.parent / "out")["unfinished"].values()
    assert "made with other models" in found["unknown"]
    assert "how far it is cannot be told here" in seedloom("status", stopped.parent / "out").out


@pytest.mark.timeout(300)
def test_following_a_build_of_another_process_ends_with_it(tmp_path):
    path = small_config(tmp_path, tmp_path / "log", {}, run={"runner": "local"},
                        targets=[{"classes": ["circle"], "accepted": 300, "attempts": 2}])  # fmt: skip
    output = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    build = subprocess.Popen(
        [sys.executable, "-m", "jobs.build", str(path)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    await_that(lambda: list(output.glob("parts/*/*.parquet")), "a first part")
    os.kill(build.pid, signal.SIGSTOP)
    follower = subprocess.Popen(
        [sys.executable, "-m", "jobs.status", str(output), "--json", "--follow"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    first = json.loads(follower.stdout.readline())
    os.kill(build.pid, signal.SIGCONT)
    rest = [json.loads(line) for line in follower.communicate(timeout=200)[0].splitlines()]
    assert build.wait(timeout=200) == 0
    (found,) = first["unfinished"].values()
    assert f"process {build.pid} on" in found["at_work"]
    assert 0 < found["targets"]["circle"]["accepted"] < 300
    assert rest[-1]["unfinished"] == {}
    assert rest[-1]["manifest"]["samples"] == 300
