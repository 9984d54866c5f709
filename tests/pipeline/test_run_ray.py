"""The runners: the same dataset from each, faults survived, mistakes told, and a clean stop."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.build import resolve
from pipeline.config import load
from pipeline.ledger import named
from pipeline.run_ray import RayRunner
from pipeline.store import Store
from schemas.errors import UserError
from tests.ray_build import (  # noqa: F401  fixture
    Driver,
    await_end_of_all,
    await_that,
    full_config,
    noise_sha256,
    packed,
    ray_instance,
    run_build,
    run_json,
    short_folder,
    small_config,
    traced,
    users_of,
)
from tests.small_build import make_config

pytestmark = pytest.mark.timeout(900)  # several builds in a test, on a machine that may be busy


def rows(output: Path) -> dict[str, dict]:
    """Every candidate of an output by its key."""
    parts = sorted((output / "parts").rglob("*.parquet"))
    return {row["key"]: row for path in parts for row in pq.read_table(path).to_pylist()}


# --- parity ------------------------------------------------------------------------------------------------

RUNNERS = {
    "local": {"runner": "local"},
    "ray-1": {"runner": "ray", "workers": 1},
    "ray-2": {"runner": "ray", "workers": 2},
}


@pytest.fixture(scope="module")
def outputs(ray_instance, drawings, tmp_path_factory):  # noqa: F811
    """The same dataset by each runner, in an output of its own; and where each left its traces."""
    made = {}
    for name, run in RUNNERS.items():
        folder = tmp_path_factory.mktemp(name)
        log = folder.parent / "log"  # its name is part of the config, so all share one
        path = full_config(folder, drawings, log, trap="raise", run=run)
        run_build(path)
        made[name] = folder / "out", log.rename(folder / "log")
    return made


def test_runners_make_the_same_dataset(outputs):
    hashes = {name: packed(output) for name, (output, _) in outputs.items()}
    assert hashes["local"] == hashes["ray-1"] == hashes["ray-2"]
    assert {name for name in hashes["local"] if name.endswith(".tar")} >= {"000000.tar", "000009.tar"}


def test_the_dataset_has_every_outcome(outputs):
    manifest = named(Store(str(outputs["local"][0])))
    (circle,), (gear,), (ring,) = (manifest.targets[c].recipes.values() for c in ("circle", "gear", "ring"))
    assert manifest.samples >= 200
    assert (circle.accepted, circle.failed, circle.surplus, circle.candidates) == (120, 1, 7, 128)
    assert gear.accepted == 80
    assert sum(gear.rejected.values()) > 0
    assert ring.exhausted
    assert 0 < ring.accepted < 40


@pytest.mark.parametrize("name", RUNNERS)
def test_a_candidate_that_raises_is_tried_elsewhere_before_it_is_believed(outputs, name):
    output, log = outputs[name]
    failed = [row for row in rows(output).values() if row["status"] == "failed"]
    assert [(row["index"], row["error"]) for row in failed] == [(5, "ArithmeticError: trapped")]
    assert len(set(traced(log, "raise"))) == (2 if name == "ray-2" else 1)
    # twice by the unit, and each time once more without its neighbours
    assert len(traced(log, "raise")) == 4


def test_ray_runs_in_other_processes_and_uses_both(outputs):
    assert set(traced(outputs["local"][1], "generate")) == {os.getpid()}
    assert len(set(traced(outputs["ray-1"][1], "generate"))) == 1
    workers = set(traced(outputs["ray-2"][1], "generate"))
    assert len(workers) == 2
    assert os.getpid() not in workers


# --- workers ------------------------------------------------------------------------------------------------


def test_a_start_that_waits_says_for_what(ray_instance, tmp_path, monkeypatch):  # noqa: F811
    import ray

    @ray.remote(num_cpus=2)
    class Hoarder:
        def pid(self):
            return os.getpid()

    hoarder = Hoarder.remote()
    ray.get(hoarder.pid.remote())
    monkeypatch.setattr("pipeline.run_ray.PATIENCE", 0.5)
    said = []

    def remark(level, text, **facts):
        said.append(text)
        if "still waiting" in text:
            ray.kill(hoarder)

    monkeypatch.setattr("pipeline.run_ray._tell", remark)
    run_build(small_config(tmp_path, tmp_path / "log"), runner="ray", workers=1)
    assert any("each needs GPU 0 of 0 free, CPU 1 of 0 free; still waiting" in text for text in said)
    assert named(Store(str(tmp_path / "out"))).samples == 12


def test_there_are_no_more_workers_than_units(ray_instance, tmp_path):  # noqa: F811
    """There is room for two, and one unit to make."""
    target = {"classes": ["circle"], "accepted": 4}
    run_build(small_config(tmp_path, tmp_path / "log", targets=[target]), runner="ray")
    assert run_json(tmp_path / "out")["workers"] == 1


# --- faults ------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_retried(ray_instance, tmp_path):  # noqa: F811
    breaking = {"method": "tests.ray_build:Breaking", "least": 0, "log": str(tmp_path / "log"), "times": 1}
    path = small_config(tmp_path, tmp_path / "log", filter=[breaking])
    run_build(path, runner="ray", workers=1)
    assert run_json(tmp_path / "out")["retries"] == 1
    assert named(Store(str(tmp_path / "out"))).samples == 12


def test_an_error_that_stays_ends_the_build_with_the_workers_traceback(ray_instance, tmp_path):  # noqa: F811
    breaking = {"method": "tests.ray_build:Breaking", "log": str(tmp_path / "log")}
    path = small_config(
        tmp_path, tmp_path / "log", filter=[breaking],
        targets=[{"classes": ["circle"], "accepted": 4, "attempts": 1}],
        run={"runner": "ray", "workers": 2, "retries": 1},
    )  # fmt: skip
    with short_folder() as folder:
        code, _, err = Driver(path, folder, RAY_ADDRESS=ray_instance).end()
    assert code == 1, err
    assert "ArithmeticError: broken on purpose" in err
    assert 'tests/ray_build.py", line' in err.replace("\\", "/")
    assert "in score" in err
    assert len(traced(tmp_path / "log", "break")) == 2
    assert len(set(traced(tmp_path / "log", "break"))) == 2  # the second try is another worker's


def test_a_mistake_in_a_worker_is_one_line(ray_instance, tmp_path):  # noqa: F811
    """And a user's own method is found by its import path relative to where the command is given."""
    (tmp_path / "my_methods.py").write_text(
        "from schemas.errors import UserError\n"
        "from stages.filter.clip import ClipFilter\n"
        "class Fussy(ClipFilter):\n"
        "    class Config(ClipFilter.Config):\n"
        "        method: str\n"
        "    def score(self, models, image_B3hw, question):\n"
        "        raise UserError('my filter: no pictures today')\n"
    )
    path = make_config(tmp_path, filter=[{"method": "my_methods:Fussy"}])
    with short_folder() as folder:
        code, _, err = Driver(path, folder, "--runner", "ray", cwd=tmp_path, RAY_ADDRESS=ray_instance).end()
    assert code == 2, err
    assert err.splitlines()[-1] == "seedloom: my filter: no pictures today"
    assert "Traceback" not in err


def test_a_worker_with_other_model_files_refuses(ray_instance, tmp_path):  # noqa: F811
    """As on a node where a model folder has another content. A mistake at the start, raised at once."""
    config = load(small_config(tmp_path, tmp_path / "log", run={"runner": "ray", "workers": 1}))
    _, plan = resolve(config)
    other = replace(plan, models={**plan.models, "backbone": "0" * 20})
    with pytest.raises(UserError, match=r"backbone: the worker on .* has other model files"):
        RayRunner(other, config.output).__enter__()


@pytest.mark.slow
def test_a_worker_that_cannot_load_is_replaced(ray_instance, tmp_path):  # noqa: F811
    log = tmp_path / "log"
    log.mkdir()
    (log / "fragile-but-in").write_text(str(os.getpid()))
    run_build(small_config(tmp_path, log), runner="ray", workers=1)
    assert len(set(traced(log, "load"))) == 2
    assert run_json(tmp_path / "out")["restarts"] == 1
    assert named(Store(str(tmp_path / "out"))).samples == 12


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_candidate_that_kills_its_worker_fails_alone(ray_instance, tmp_path, workers):  # noqa: F811
    log = tmp_path / "log"
    log.mkdir()
    (log / "harmless").touch()
    traps = {noise_sha256("circle", "noise", 5): "kill"}
    run_build(small_config(tmp_path / "calm", log, traps))
    (log / "harmless").unlink()
    run_build(small_config(tmp_path, log, traps), runner="ray", workers=workers)

    calm, made = rows(tmp_path / "calm" / "out"), rows(tmp_path / "out")
    failed = [key for key, row in made.items() if row["status"] == "failed"]
    assert [made[key]["index"] for key in failed] == [5]
    assert "died" in made[failed[0]]["error"]
    others = {key: row for key, row in made.items() if row["index"] // 4 == 1 and key not in failed}
    assert len(others) == 3
    assert all(row == calm[key] for key, row in others.items())
    facts = run_json(tmp_path / "out")
    assert facts["restarts"] == len(traced(log, "kill")) > 1
    assert named(Store(str(tmp_path / "out"))).samples == 12


@pytest.mark.parametrize("retries", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_worker_that_hangs_is_ended(ray_instance, tmp_path, retries):  # noqa: F811
    """A unit that hangs once is made by the next worker; one that always does ends the build, in one line."""
    log = tmp_path / "log"
    traps = {noise_sha256("circle", "noise", 5): "hang once" if retries else "hang"}
    run = {"runner": "ray", "workers": 1, "unit_timeout": 5, "retries": retries}
    path = small_config(tmp_path, log, traps, run=run)
    if retries:
        run_build(path)
        facts = run_json(tmp_path / "out")
        assert facts["restarts"] == 1
        assert facts["retries"] >= 1
        assert named(Store(str(tmp_path / "out"))).samples == 12
    else:
        with pytest.raises(UserError, match=r"unit 1 of circle / noise: not done within 5 s \(run.unit_ti"):
            run_build(path)
        assert len(set(traced(log, "hang"))) == 2  # it had another chance, with nothing beside it


# --- what is to be seen ------------------------------------------------------------------------------------


def scraped(build: str) -> dict[str, float]:
    """What Prometheus would find of a build on the one node: sums over the processes."""
    import ray

    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as answer:
        lines = [line for line in answer.read().decode().splitlines() if f'build="{build}"' in line]
    sums: Counter[str] = Counter()
    for line in lines:
        name, stage = line.partition("{")[0], re.search(r'stage="(\w+)"', line)
        sums[f"{name} {stage[1]}" if stage else name] += float(line.rpartition(" ")[2])
    return sums


def test_logs_and_metrics_tell_of_the_build(ray_instance, seedloom, tmp_path):  # noqa: F811
    breaking = {"method": "tests.ray_build:Breaking", "least": 0.3, "log": str(tmp_path / "log"), "times": 1}
    traps = {noise_sha256("circle", "noise", 5): "raise"}
    path = small_config(tmp_path, tmp_path / "log", traps, filter=[breaking])
    ended = seedloom("build", path, "--json", "--runner", "ray", "--workers", 1)
    assert ended.code == 0, ended.err
    manifest = named(Store(str(tmp_path / "out")))
    (account,) = manifest.targets["circle"].recipes.values()

    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert {line["build"] for line in lines} == {manifest.build_id}
    made = {row["index"]: key for key, row in rows(tmp_path / "out").items()}
    (stream,) = {path.parent.name for path in (tmp_path / "out" / "parts").rglob("*.parquet")}
    (retried,) = [line for line in lines if line.get("level") == "warning"]
    assert "ArithmeticError: broken on purpose" in retried["text"]
    assert (retried["stream"], retried["candidates"][0]) == (stream, made[retried["unit"] * 4])
    failing = [line for line in lines if line.get("level") == "debug" and line["candidates"] == [made[5]]]
    assert [line.get("errors") for line in failing] == [{"5": "ArithmeticError: trapped"}, None]
    assert {(line["stream"], line["unit"]) for line in failing} == {(stream, 1)}

    counts = {
        "ray_seedloom_accepted": account.accepted,
        "ray_seedloom_rejected": sum(account.rejected.values()),
        "ray_seedloom_failed": 1,
        "ray_seedloom_queue_depth": 0,
        "ray_seedloom_retries_total": 1,
    }
    assert account.failed == 1
    assert sum(account.rejected.values()) > 0

    def told() -> dict[str, float]:
        found = scraped(manifest.build_id)
        stages = {f"ray_seedloom_stage_seconds_total {stage}" for stage in ("generate", "filter", "pack")}
        return found if all(found.get(n) == v for n, v in counts.items()) and stages <= set(found) else {}

    found = await_that(told, "the metrics", pause=0.5)
    assert found["ray_seedloom_stage_seconds_total generate"] > 0


# --- stopping ----------------------------------------------------------------------------------------------


def to_all(driver: Driver) -> None:
    """Ctrl-C on a terminal reaches every process of the foreground group."""
    os.killpg(driver.process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(to_all, id="ctrl-c"),
        pytest.param(lambda d: d.process.send_signal(signal.SIGINT), id="sigint", marks=pytest.mark.slow),
        pytest.param(lambda d: d.process.send_signal(signal.SIGTERM), id="sigterm", marks=pytest.mark.slow),
    ],
)
def test_a_stop_is_clean_and_the_next_run_completes(outputs, references, tmp_path, stop):
    """The next run is local: whoever goes on, the dataset is the same."""
    output, log = tmp_path / "out", outputs["local"][1].parent.parent / "log"
    path = full_config(tmp_path, references, log, trap="raise", run=RUNNERS["ray-2"])
    with short_folder() as folder:
        driver = Driver(path, folder)
        driver.when(lambda: len(list((output / "parts").rglob("*.parquet"))) >= 3, "the third part")
        assert len(users_of(folder)) > 3  # the instance, its workers and the driver
        stop(driver)
        code, _, err = driver.end()
        assert code == 130, err
        last = err.splitlines()[-1]
        assert last.startswith("seedloom: stopped; nothing is lost")
        assert last.endswith("Run the same command again to go on")
        assert "Traceback" not in err
        await_end_of_all(folder)
    assert not list(output.rglob("manifest.json"))
    run_build(path, runner="local")
    assert packed(output) == packed(outputs["local"][0])


def test_a_stop_before_the_build_begins_is_one_line_too(tmp_path):
    config = tmp_path / "dataset.yaml"
    os.mkfifo(config)  # reading it takes until somebody has written

    def read_from() -> bool:
        try:
            writer.append(os.open(config, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads
            return False
        return True

    writer: list[int] = []
    with short_folder() as folder:
        driver = Driver(config, folder)
        driver.when(read_from, "the config was read")
        driver.process.send_signal(signal.SIGTERM)
        code, _, err = driver.end()
    os.close(writer[0])
    assert (code, err) == (130, "seedloom: stopped\n")


def test_json_lines(tmp_path):
    path = small_config(tmp_path, tmp_path / "log")
    with short_folder() as folder:
        code, out, err = Driver(path, folder, "--json", "--set", "run.runner=local").end()
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["event"] == "message"
    progress = [line for line in lines if line["event"] == "progress" and line["phase"] == "generate"]
    assert [line["done"] for line in progress] == [1, 2, 3]
    assert {line["total"] for line in progress} == {3}
    tallies = [line["targets"]["circle"] for line in lines if line["event"] == "targets"]
    assert tallies[-1] == {"quota": 12, "accepted": 12, "rejected": 0, "failed": 0}
    assert lines[-1]["event"] == "complete"
    assert (lines[-1]["samples"], lines[-1]["missing"], lines[-1]["made"]) == (12, 0, True)
