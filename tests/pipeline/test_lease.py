"""Who works at a build: one run alone, and a dead one is replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import lease as module
from pipeline.build import build
from pipeline.config import load
from pipeline.lease import PRUNE, Lease
from pipeline.store import Store
from pipeline.tasks import Done
from schemas.errors import Busy
from tests.local_build import Silent, config, fresh, packed, run
from tests.ray_build import await_that, small_config
from tests.ray_build import packed as files_of

ROOT = Path(__file__).parents[2]
FAST = 0.1  # seconds between signs of life


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "out") if request.param == "file" else f"memory://{tmp_path.name}")


@pytest.fixture
def elsewhere(monkeypatch):
    """Let all leases look as if they were held on another machine, of whose processes nothing is known."""
    monkeypatch.setattr(module, "_machine", lambda: None)


def holder(store: Store, epoch: int) -> dict:
    return json.loads(store.get(f"leases/x/{epoch}.json"))


def test_epochs_follow_one_another(store):
    for epoch in (1, 2, 3):
        with Lease(store, "x", 10) as lease:
            assert lease.epoch == epoch
            assert holder(store, epoch)["pid"] == os.getpid()


def test_while_it_is_held_nobody_else_gets_it(store, elsewhere):
    with (
        Lease(store, "x", FAST),
        pytest.raises(Busy, match=rf"by process {os.getpid()} on .+ since 2") as told,
    ):
        Lease(store, "x", FAST).__enter__()
    assert told.value.exit_code == 5
    with Lease(store, "x", FAST) as lease:
        assert lease.epoch == 2


def test_another_name_is_another_lease(store):
    with Lease(store, "x", 10), Lease(store, "y", 10) as other:
        assert other.epoch == 1


def test_a_holder_that_gives_no_sign_of_life_is_replaced_and_stops(store, elsewhere, monkeypatch):
    silent = threading.Event()
    beat = Lease._keep_beating
    monkeypatch.setattr(Lease, "_keep_beating", lambda self: silent.wait(60) and beat(self))
    old = Lease(store, "x", FAST)
    with old:
        old.check()
        with Lease(store, "x", FAST) as new:
            assert new.epoch == old.epoch + 1
            silent.set()  # it comes back to life, and looks around
            old._thread.join(60)
            with pytest.raises(Busy, match="was taken over by process"):
                old.check()
            new.check()
    assert store.get("leases/x/1.beat") != b"released"
    assert store.get("leases/x/2.beat") == b"released"


def test_a_process_of_this_machine_that_is_no_more_is_replaced_at_once(tmp_path):
    store = Store(str(tmp_path))
    code = (
        "from pipeline.lease import Lease; from pipeline.store import Store; import os\n"
        f"Lease(Store({str(tmp_path)!r}), 'x', 3600).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    with Lease(store, "x", 3600) as lease:  # hours, if it had to wait for a sign of life
        assert lease.epoch == 2


def test_of_many_who_come_at_once_one_gets_it(store):
    together = threading.Barrier(8, timeout=60)
    over = threading.Event()

    def come(_):
        together.wait()
        try:
            with Lease(store, "x", FAST):
                over.wait(60)
                return True
        except Busy:
            return False

    with ThreadPoolExecutor(8) as threads:
        came = [threads.submit(come, n) for n in range(8)]
        await_that(lambda: sum(c.done() for c in came) == 7, "the end of those who came too late")
        over.set()
    assert sum(c.result() for c in came) == 1


def test_no_build_begins_while_the_store_is_pruned_nor_the_other_way_round(store):
    with Lease(store, PRUNE, FAST), pytest.raises(Busy, match="prune is at work already"):
        Lease(store, "build-1", 10, beside=PRUNE).__enter__()
    with Lease(store, "build-1", 10, beside=PRUNE) as lease:  # what was refused holds nothing
        assert lease.epoch == 2


def test_whoever_waits_goes_by_the_pace_of_the_one_at_work(store, elsewhere):
    """A newcomer of quick heartbeats does not take one of slow ones for dead."""
    slow = 30 * FAST
    with Lease(store, "x", slow), pytest.raises(Busy):
        Lease(store, "x", FAST / 10).__enter__()


def test_nothing_is_begun_once_it_is_lost(store):
    begun = []

    class Endless:
        def next(self):
            begun.append(1)
            return None

        def done(self, task, receipt):
            begun.append(receipt)

        def killed(self, task):
            begun.append(task)

    lease = Lease(store, "x", 10)
    with lease:

        def work_off(work):
            work.next()
            work.done(None, Done(1))
            lease._lost.set()
            work.next()

        with pytest.raises(Busy):
            lease.guard(work_off)(Endless())
    assert begun == [1, Done(1)]


# --- builds ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_backbone")
def test_a_build_lets_go_at_its_end_and_one_with_nothing_to_do_asks_for_nothing(tmp_path):
    path = config(tmp_path)
    assert run(path).made
    leases = sorted(str(p.relative_to(tmp_path / "out")) for p in tmp_path.glob("out/leases/*/*"))
    assert [Path(p).name for p in leases] == ["1.beat", "1.json"]
    assert not run(path).made
    assert len(list(tmp_path.glob("out/leases/*/*"))) == 2


@pytest.mark.usefixtures("one_backbone")
def test_packing_and_building_wait_for_one_another(tmp_path, elsewhere):
    path = config(tmp_path)
    result = run(path)
    folder = tmp_path / "out" / result.folder
    (folder / "manifest.json").unlink()
    with Lease(Store(str(tmp_path / "out")), f"build-{result.manifest.build_id}", FAST):
        for work in (
            lambda: packed(path, f"run.heartbeat={FAST}"),
            lambda: run(path, f"run.heartbeat={FAST}"),
        ):
            with pytest.raises(Busy, match=f"build {result.manifest.build_id} is at work already"):
                work()
    assert packed(path).manifest == result.manifest


@pytest.mark.usefixtures("one_backbone")
def test_a_build_that_is_replaced_stops_and_the_other_completes_it(tmp_path, elsewhere, monkeypatch):
    """The first stands still in its second unit until the second has taken over and is through."""
    from tests.small_build import Sketch

    path = config(tmp_path, run={"runner": "local", "heartbeat": FAST})
    expected = fresh(tmp_path, path)[0].manifest
    stopped, other = threading.Event(), threading.Event()
    first = threading.get_ident()
    beat, draw = Lease._keep_beating, Sketch.__call__
    calls = []
    monkeypatch.setattr(Lease, "_keep_beating", lambda self: beat(self) if other.is_set() else None)

    def call(self, backbone, models, order):
        if threading.get_ident() == first:
            calls.append(1)
            if len(calls) == 3:
                stopped.set()
                second.result(120)
        return draw(self, backbone, models, order)

    def take_over():
        stopped.wait(120)
        other.set()
        return build(load(path), Silent(), make_runner).manifest

    from jobs.build import make_runner

    monkeypatch.setattr(Sketch, "__call__", call)
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(take_over)
        monkeypatch.setattr(Lease, "check", _looking(Lease.check))
        with pytest.raises(Busy, match="was taken over by process"):
            build(load(path), Silent(), make_runner)
        assert second.result() == expected
    assert len(calls) <= 4  # it ended its unit, and began no other


def _looking(check):
    """The check of a lease whose heart beats only when it is asked."""

    def call(self):
        if self.store.exists(f"leases/{self.name}/{self.epoch + 1}.json"):
            self._lost.set()
        check(self)

    return call


def start(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.build", str(path)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_two_processes_and_one_that_is_frozen(tmp_path):
    """A real run is frozen in mid-build; another waits, replaces it, completes; the first thaws and stops."""
    log = tmp_path / "log"
    path = small_config(tmp_path, log, {}, run={"runner": "local", "heartbeat": 0.5},
                        targets=[{"classes": ["circle"], "accepted": 200, "attempts": 2}])  # fmt: skip
    output = tmp_path / "out"
    first = start(path)
    await_that(lambda: list(output.glob("parts/*/*.parquet")), "a first part")
    os.kill(first.pid, signal.SIGSTOP)
    second = start(path)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert "complete" in out
    made = files_of(output)
    os.kill(first.pid, signal.SIGCONT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 5
    assert err.splitlines()[-1].startswith("seedloom: ")
    assert f"was taken over by process {second.pid}" in err
    assert files_of(output) == made
