"""Kill any process at any moment and run the same command again: the same dataset, hash for hash."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.ray_build import (
    Driver,
    await_end_of_all,
    full_config,
    noise_sha256,
    packed,
    run_build,
    run_json,
    short_folder,
    small_config,
    trace,
    traced,
    users_of,
)

pytestmark = pytest.mark.timeout(900)  # several builds in a test, on a machine that may be busy

RAY = {"runner": "ray", "workers": 2}


@pytest.fixture(scope="module")
def undisturbed(drawings, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The log folder that all builds of this file name in their config, and the files of a calm build."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_build(full_config(folder, drawings, folder / "log", trap="raise"))
    return folder / "log", packed(folder / "out")


def found(output: Path, pattern: str) -> list[Path]:
    return sorted(output.glob(pattern))


COMPLETION = ("builds/*/manifest.json", "builds/*/run.json", "history/*", "latest.json")


# The moments at which the driver is killed: so many more files of these than there were when it started.
MOMENTS = {
    "invert: a first seed": ("seeds/*/*", 1),
    "generate: three more parts": ("parts/*/*", 3),
    "commit: more scores": ("scores/*/*/*", 1),
    "pack: a first tar": ("builds/*/shards/*.tar", 1),
    "pack: all shards, no manifest": ("builds/*/shards/*", None),
}


def roll_back(output: Path, moment: str) -> None:
    """Take away what was written between the moment and the kill: a crash a little earlier left just this."""
    late = [path for pattern in COMPLETION for path in found(output, pattern)]
    if moment == "pack: a first tar":
        late += found(output, "builds/*/shards/*")[1:]
    for path in late:
        path.unlink()


@pytest.mark.parametrize(
    "linger",
    [
        # a local Ray instance outlives its driver by seconds, and its workers go on writing meanwhile
        pytest.param(True, id="workers-linger"),
        # a machine that is lost takes everything with it
        pytest.param(False, id="all-at-once", marks=pytest.mark.slow),
    ],
)
def test_a_driver_killed_five_times(undisturbed, references, tmp_path, linger):
    """At five moments, one after the other in one output; then the same command once more."""
    log, expected = undisturbed
    output = tmp_path / "out"
    path = full_config(tmp_path, references, log, trap="raise", run=RAY)
    with short_folder() as folder:
        for moment, (pattern, more) in MOMENTS.items():
            enough = len(found(output, pattern)) + more if more else len(expected) - 1
            driver = Driver(path, folder)
            driver.when(lambda p=pattern, n=enough: len(found(output, p)) >= n, moment)
            if not linger:
                for pid in users_of(folder):
                    os.kill(pid, signal.SIGKILL)
            driver.kill()
            if moment.startswith("pack"):
                await_end_of_all(folder)
                roll_back(output, moment)
            assert not found(output, "builds/*/manifest.json"), moment
        code, _, err = Driver(path, folder).end()
        assert code == 3, err  # complete; the class `ring` is short, as it is in the calm build
        await_end_of_all(folder)
    assert packed(output) == expected


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        # what a machine that is to be taken away sends first: the worker abandons its units
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_worker_killed_in_the_middle(undisturbed, references, tmp_path, how):
    log, expected = undisturbed
    output = tmp_path / "out"
    path = full_config(tmp_path, references, log, trap="raise", run=RAY)
    before = set(traced(log, "generate"))
    with short_folder() as folder:
        driver = Driver(path, folder)
        driver.when(lambda: len(found(output, "parts/*/*")) >= 3, "the third part")
        os.kill((set(traced(log, "generate")) - before).pop(), how)
        code, _, err = driver.end()
        assert code == 3, err
        await_end_of_all(folder)
    assert packed(output) == expected
    assert run_json(output)["restarts"] == 1


def test_a_worker_told_to_end_in_the_middle_of_a_unit(tmp_path):
    """A machine to be taken away sends SIGTERM: what is not done is abandoned, and made by another worker.

    This worker would never be done by itself; it draws one unit and has another waiting.
    """
    log, traps = tmp_path / "log", {noise_sha256("circle", "noise", 1): "hang once"}
    trace(log, "hang")  # so that the build to compare with does not hang
    run_build(small_config(tmp_path / "calm", log, traps))
    shutil.rmtree(log)
    path = small_config(tmp_path, log, traps, run=RAY)
    with short_folder() as folder:
        driver = Driver(path, folder)
        driver.when(lambda: traced(log, "hang"), "the worker hangs")
        (pid,) = traced(log, "hang")
        os.kill(pid, signal.SIGTERM)
        driver.when(lambda: not Path(f"/proc/{pid}").exists(), "the worker has ended")
        code, _, err = driver.end()
        assert code == 0, err
        await_end_of_all(folder)
    assert packed(tmp_path / "out") == packed(tmp_path / "calm/out")
    assert run_json(tmp_path / "out")["restarts"] == 1
