"""The scale benchmark: bookkeeping that is killed ends as if it was not, and its store takes its time."""

from __future__ import annotations

import json
import threading

import pytest
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks import scale as module
from jobs.benchmarks.scale import PretendedDevice, SlowStore, _make, _resume, describe, keep_busy, scale
from pipeline.store import Store
from pipeline.tasks import UnitTask
from schemas.manifest import Manifest

BOOKKEEPING = {
    "candidates": 10**7, "units": 625_000, "streams": 1000, "units_made": 593_750, "plan_seconds": 1.0,
    "make_seconds": 30.0, "make_cpu_seconds": 20.0, "replan_seconds": 1.0, "learn_seconds": 2.0,
    "pack_seconds": 1.0, "survey_seconds": 3.0, "segments": 21, "index_mb": 2.0, "imports_mb": 600.0,
    "make_peak_mb": 900.0, "resume_peak_mb": 900.0, "peak_mb": 950.0,
}  # fmt: skip
DEVICES = {
    "devices": 64, "unit_seconds": 4.0, "units": 1280, "busy_share": 0.95, "seconds": 80.0,
    "start_seconds": 50.0, "driver_cpu_ms_of_a_unit": 1.0, "driver_peak_mb": 700.0,
}  # fmt: skip
MACHINE = {"latency": 0.02, "unit": 16, "hardware": "a machine", "versions": {"ray": "2"}, "date": "today"}


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr(SlowStore, "made", {})
    monkeypatch.setattr(SlowStore, "latency", 0.0)


def manifest(folder) -> Manifest:
    (path,) = (folder / "out").glob("builds/*/manifest.json")
    return Manifest.from_bytes(path.read_bytes(), str(path))


def test_a_killed_and_resumed_bookkeeping_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.index.RECEIPTS", 8)
    monkeypatch.setattr(module, "OF_STREAM", 500)
    monkeypatch.setattr(module, "IN_FLIGHT", 10)
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    first = _make(str(killed), 1000, 0.0)
    second = _resume(str(killed), 1000, 0.0)
    assert first["units_made"] == int(0.95 * 1000 / 16)
    # what was not written when it was killed is made once more, and nothing else
    assert first["units_made"] - 8 < second["units_known"] <= first["units_made"]
    assert second["samples"] == 2 * 300
    monkeypatch.setattr(module, "KILLED", 10)  # not before the end
    all_of_it = _make(str(calm), 1000, 0.0)
    assert all_of_it["units_made"] == second["units"]
    assert manifest(killed).shortfall == 0


def test_every_call_and_every_page_takes_the_latency(tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(SlowStore, "latency", 0.5)
    module._config(str(tmp_path), 1000)
    store = Store(f"slow://{tmp_path}/out")
    for call in (
        lambda: store.put_new("index/x", b"1"),
        lambda: store.get("index/x"),
        lambda: store.exists("index/x"),
        lambda: list(store.list("index")),
        lambda: store.remove("index/x"),
    ):
        waited.clear()
        call()
        assert waited == [0.5], call
    SlowStore.made["a"] = 2500
    waited.clear()
    names = list(store.list("parts/a"))
    assert (len(names), names[-1]) == (2500, "002499.parquet")
    assert sum(waited) == 3 * 0.5
    assert list(store.list("scores/b/filter")) == []


def test_put_if_absent_is_kept(tmp_path):
    module._config(str(tmp_path), 1000)
    Store(f"slow://{tmp_path}/out").probe()


def test_a_pretended_device_does_one_unit_at_a_time():
    device, at_once, most = PretendedDevice(), 0, 0
    device.setup((0.0, 0.0), "")
    task = UnitTask("0" * 20, 3)

    class Watched:
        def __enter__(self):
            nonlocal at_once, most
            lock.acquire()
            at_once += 1
            most = max(most, at_once)

        def __exit__(self, *error):
            nonlocal at_once
            at_once -= 1
            lock.release()

    lock = device._device
    device._device = Watched()
    receipts = []
    threads = [threading.Thread(target=lambda: receipts.append(device.run(task))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(set(map(repr, receipts))) == 1
    assert receipts[0].outcomes != device.run(UnitTask("0" * 20, 4)).outcomes


@pytest.mark.parametrize(
    ("change", "missed"),
    [({}, 0), ({"learn_seconds": 11.0}, 1), ({"make_peak_mb": 1100.0, "learn_seconds": 11.0}, 2)],
)
def test_a_missed_target_is_said(change, missed):
    text = describe({"bookkeeping": [BOOKKEEPING | change], "devices": [DEVICES], **MACHINE})
    assert text.count("MISSED") == missed
    assert text.count("reached") == 3 - missed
    assert "MISSED" in describe({"bookkeeping": [], "devices": [DEVICES | {"busy_share": 0.89}], **MACHINE})


def test_every_size_is_measured_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "bookkeeping", lambda n, latency: BOOKKEEPING | {"candidates": n})
    monkeypatch.setattr(
        module, "keep_busy", lambda n, seconds, latency: DEVICES | {"devices": n, "unit_seconds": seconds}
    )
    app = Typer()
    app.command()(scale)
    out = tmp_path / "scale.json"
    sizes = ["--candidates", "1000", "--candidates", "2000", "--devices", "2", "--devices", "4"]
    done = CliRunner().invoke(app, [*sizes, "--seconds", "0.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    facts = json.loads(out.read_text())
    assert [b["candidates"] for b in facts["bookkeeping"]] == [1000, 2000]
    assert [(d["devices"], d["unit_seconds"]) for d in facts["devices"]] == [(2, 0.5), (4, 0.5)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_devices_are_busy():
    facts = keep_busy(2, 1.0, 0.02)
    assert facts["units"] == 40
    assert 0 < facts["busy_share"] <= 1
