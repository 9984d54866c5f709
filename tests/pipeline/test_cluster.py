"""A cluster whose nodes come and go: workers follow it, and the dataset is that of a local build."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from pipeline.build import resolve, survey
from pipeline.config import load
from pipeline.pack import plan_shards
from pipeline.phases import ListWork
from pipeline.run_ray import RayRunner
from tests.ray_build import (
    Driver,
    await_end_of_all,
    packed,
    ray_cluster,
    run_build,
    run_json,
    short_folder,
    small_config,
)

pytestmark = pytest.mark.timeout(900)  # several builds in a test, on a machine that may be busy


def config(folder: Path, log: Path, **run: object) -> Path:
    generate = {
        "method": "tests.ray_build:Placed", "steps": 1, "guidance": 1, "log": str(log), "traps": {},
    }  # fmt: skip
    return small_config(
        folder,
        log,
        recipes={"noise": {"generate": generate, "unit": 4, "batch": 2}},
        targets=[{"classes": ["circle", "gear"], "accepted": 40, "attempts": 2}],
        filter=[{"method": "tests.small_build:HashFilter", "least": 0.2}],
        shard={"samples": 10, "window": 2},
        run={"runner": "ray", **run},
    )


def places(log: Path) -> list[tuple[str, str]]:
    """Node and visible GPUs of each process that drew something."""
    return [tuple(path.read_text().split()) for path in (log / "places").glob("*")]


def local(folder: Path, log: Path) -> Path:
    """The output of an undisturbed local build."""
    log.mkdir()
    (log / "go").touch()
    run_build(config(folder, log), runner="local")
    (log / "go").unlink()
    for path in (log / "places").glob("*"):
        path.unlink()
    return folder / "out"


def test_workers_follow_the_nodes(tmp_path):
    """Three nodes with pretended GPUs; the one with two goes in mid-build, and another comes."""
    log = tmp_path / "log"
    expected = packed(local(tmp_path / "local", log))
    with ray_cluster() as (cluster, folder):
        head = cluster.add_node(num_cpus=2, num_gpus=1, labels={"zone": "a"})
        twin = cluster.add_node(num_cpus=2, num_gpus=2, labels={"zone": "b"})
        cluster.add_node(num_cpus=2, num_gpus=1, labels={"zone": "c"})  # none of ours
        path = config(tmp_path / "ray", log, labels={"zone": ["a", "b"]})
        driver = Driver(path, folder, RAY_ADDRESS=cluster.address)
        driver.when(lambda: len(places(log)) == 3, "three workers drew something")
        assert sorted(places(log)) == sorted([(head.node_id, "0"), (twin.node_id, "0"), (twin.node_id, "1")])
        cluster.remove_node(twin)  # and all that was in the middle of something there
        late = cluster.add_node(num_cpus=2, num_gpus=1, labels={"zone": "b"})
        driver.when(lambda: (late.node_id, "0") in places(log), "the new node drew something")
        assert not list((tmp_path / "ray" / "out").rglob("manifest.json"))
        (log / "go").touch()
        code, _, err = driver.end()
    assert code == 0, err
    assert err.count("a worker was lost") == 2
    assert packed(tmp_path / "ray" / "out") == expected
    assert {node for node, _ in places(log)} == {head.node_id, twin.node_id, late.node_id}
    facts = run_json(tmp_path / "ray" / "out")
    assert (facts["workers"], facts["restarts"]) == (3, 2)


def test_cores_help_to_pack(tmp_path):
    """Where workers have GPUs; here the only one has its hands full."""
    output = local(tmp_path, tmp_path / "log")
    expected = packed(output)
    for path in output.glob("builds/*/shards/*"):
        path.unlink()
    with short_folder() as folder:
        ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder))
        try:
            settings = load(config(tmp_path, tmp_path / "log"))
            store, plan = resolve(settings)
            streams = survey(store, plan, lambda text: None).streams
            shards = list(plan_shards(plan, {name: stream.select() for name, stream in streams.items()}))
            receipts = {}
            with RayRunner(plan, settings.output) as runner:
                runner.seats[0].alone = True
                runner.run(ListWork(shards, lambda task, receipt: receipts.update({task.first: receipt})))
                assert len(runner.seats) == 1  # they are gone when there is nothing to pack
        finally:
            ray.shutdown()
        await_end_of_all(folder)
    assert len(receipts) == len(shards) == 4
    assert packed(output) == expected
