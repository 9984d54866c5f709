"""A cluster whose nodes come and go: workers follow it, and the dataset is that of a local build."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray_build import Driver, packed, ray_cluster, run_build, run_json, small_config

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


def test_workers_follow_the_nodes(tmp_path):
    """Three nodes with four pretended GPUs; the one with two goes in mid-build, and another comes."""
    log = tmp_path / "log"
    log.mkdir()
    (log / "go").touch()
    run_build(config(tmp_path / "local", log), runner="local")
    (log / "go").unlink()
    for path in (log / "places").glob("*"):
        path.unlink()

    with ray_cluster() as (cluster, folder):
        head = cluster.add_node(num_cpus=2, num_gpus=1)
        twin = cluster.add_node(num_cpus=2, num_gpus=2)
        third = cluster.add_node(num_cpus=2, num_gpus=1)
        path = config(tmp_path / "ray", log, threads_per_worker=1)
        driver = Driver(path, folder, RAY_ADDRESS=cluster.address)
        driver.when(lambda: len(places(log)) == 4, "four workers drew something")
        assert sorted(places(log)) == sorted(
            [(head.node_id, "0"), (third.node_id, "0"), (twin.node_id, "0"), (twin.node_id, "1")]
        )
        cluster.remove_node(twin)  # and all that was in the middle of something there
        late = cluster.add_node(num_cpus=2, num_gpus=1)
        driver.when(lambda: (late.node_id, "0") in places(log), "the new node drew something")
        assert not list((tmp_path / "ray" / "out").rglob("manifest.json"))
        (log / "go").touch()
        code, _, err = driver.end()
    print(err)
    assert code == 0, err
    assert "a worker was lost" in err
    assert packed(tmp_path / "ray" / "out") == packed(tmp_path / "local" / "out")
    facts = run_json(tmp_path / "ray" / "out")
    assert (facts["workers"], facts["restarts"]) == (4, 2)
