"""The store's one promise: an object is written whole, and once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.store import Store
from schemas.errors import UserError

ROOT = Path(__file__).parents[2]


class Overwriting(MemoryFileSystem):
    """A store that takes a conditional write for an ordinary one, as some S3 look-alikes do."""

    protocol = "overwriting"
    store = {}  # noqa: RUF012  as fsspec has it
    pseudo_dirs = [""]  # noqa: RUF012

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode="overwrite")


class Unaware(Overwriting):
    """A store that has never heard of conditional writes."""

    protocol = "unaware"

    def pipe_file(self, path, value):
        super().pipe_file(path, value)


class Broken(Overwriting):
    """A store whose client fails in its own way."""

    protocol = "broken"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        raise RuntimeError("no credentials found\nsecond line")


for kind in (Overwriting, Unaware, Broken):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}/out")


def test_the_first_writer_wins(store):
    assert store.put_new("a/b/c.bin", b"first")
    assert not store.put_new("a/b/c.bin", b"second")
    assert store.get("a/b/c.bin") == b"first"
    assert store.get_range("a/b/c.bin", 1, 3) == b"irs"


def test_names_and_absence(store):
    for name in ("f/2", "f/10", "f/deeper/x", "g"):
        store.put_new(name, b"")
    assert list(store.list("f")) == ["10", "2", "deeper"]
    assert list(store.list("nothing")) == []
    assert store.exists("f/2")
    assert not store.exists("f/3")
    with pytest.raises(FileNotFoundError):
        store.get("f/3")


def test_a_listing_sees_what_another_process_wrote_since(tmp_path):
    store, other = Store(str(tmp_path)), Store(f"file://{tmp_path}")
    store.put_new("f/1", b"")
    assert list(store.list("f")) == ["1"]
    other.put_new("f/2", b"")
    assert list(store.list("f")) == ["1", "2"]


def test_put_replaces(store):
    store.put("latest.json", b"long content")
    store.put("latest.json", b"short")
    assert store.get("latest.json") == b"short"


def test_no_scratch_is_left(tmp_path):
    store = Store(str(tmp_path / "out"))
    store.put_new("a", b"1")
    store.put_new("a", b"2")
    store.put("b", b"3")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["a", "b"]


def test_one_of_many_threads_wins(tmp_path):
    store = Store(str(tmp_path))
    contents = [bytes([n]) * 50_000 for n in range(16)]
    for round_ in range(8):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda data, name=f"o/{round_}": store.put_new(name, data), contents))
        assert won.count(True) == 1
        assert store.get(f"o/{round_}") == contents[won.index(True)]


def _compete(folder: str, number: int, start, results) -> None:
    store = Store(folder)
    start.wait()
    results.put([n for n in range(40) if store.put_new(f"o/{n}", bytes([number]) * 10_000)])


def test_one_of_many_processes_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_compete, args=(str(tmp_path), n, start, results)) for n in range(4)]
    for process in processes:
        process.start()
    won = [n for _ in processes for n in results.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(won) == list(range(40))
    assert all(len(set(Store(str(tmp_path)).get(f"o/{n}"))) == 1 for n in range(40))


SIZE = 16_000_000  # bytes; large enough for a moment in mid-write to be met

WRITER = f"""
import sys
from pipeline.store import Store
store = Store(sys.argv[1])
for n in range(1000):
    store.put_new(f"o/{{n}}", bytes([n % 256]) * {SIZE})
"""


def test_kill_9_leaves_no_torn_object(tmp_path):
    for run in range(3):
        folder = tmp_path / str(run) / "o"
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder.parent)], cwd=ROOT) as writer:
            deadline = time.monotonic() + 60
            seen: dict[str, int] = {}  # name → size at first sight: what a crash at that moment would leave
            while len(seen) < 3 + run and time.monotonic() < deadline:
                for path in folder.glob("*"):
                    seen.setdefault(path.name, path.stat().st_size)
            writer.send_signal(signal.SIGKILL)
        assert set(seen.values()) == {SIZE}
        names = sorted(int(path.name) for path in folder.iterdir())
        assert names == list(range(len(names)))
        assert all((folder / str(n)).read_bytes() == bytes([n]) * SIZE for n in names)
        assert Store(str(folder.parent)).put_new(f"o/{len(names)}", b"the next run goes on")


def test_a_torn_scratch_file_is_no_object(tmp_path, monkeypatch):
    """A write that fails at its last moment has put nothing under the final name."""
    store = Store(str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        store.put_new("parts/1", b"data")
    monkeypatch.undo()
    assert not store.exists("parts/1")
    assert store.put_new("parts/1", b"data")


def test_a_probe_leaves_nothing(store):
    store.probe()
    assert not any(store.list("")) or not any(store.list(".tmp"))


def test_a_probed_folder_that_was_not_there_is_not_there_after(tmp_path):
    Store(str(tmp_path / "out")).probe()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused(tmp_path):
    Path(tmp_path, "file").write_text("")
    for output in ("file", "file/out"):
        with pytest.raises(
            UserError, match=r"output '.*file.*': cannot be written \(Not a directory\); choose"
        ):
            Store(f"{tmp_path}/{output}").probe()


@pytest.mark.parametrize("protocol", ["overwriting", "unaware"])
def test_a_store_without_conditional_writes_is_refused(protocol):
    with pytest.raises(UserError, match="no conditional writes"):
        Store(f"{protocol}://bucket/out").probe()


def test_a_store_that_only_reads_is_refused():
    with pytest.raises(UserError, match="no conditional writes"):
        Store("data://out").probe()


def test_a_failing_store_gives_one_line(monkeypatch):
    monkeypatch.setattr("pipeline.store.GIVE_UP_AT_ONCE", 1.0)
    with pytest.raises(UserError) as caught:
        Store("broken://bucket/out").probe()
    assert "no credentials found" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["gopher://host/out", "nothing-known://x"])
def test_an_unknown_kind_of_store_is_refused(uri):
    with pytest.raises(UserError, match="not a usable URI"):
        Store(uri)


def test_a_probe_removes_old_scratch_files_and_spares_young_ones(tmp_path):
    store = Store(str(tmp_path))
    assert store.put_new("a", b"1")
    old, young = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "young"
    for path in (old, young):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.probe()
    assert not old.exists()
    assert young.read_bytes() == b"half"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_disk):
    store = Store(str(small_disk / "out"))
    assert store.put_new("parts/small", b"x")
    for write in (store.put_new, store.put):
        with pytest.raises(
            UserError, match=r"No space left on device; make room and run the same command again"
        ):
            write("parts/large", bytes(2 << 20))
    assert [str(p.relative_to(small_disk)) for p in small_disk.rglob("*") if p.is_file()] == [
        "out/parts/small"
    ]
    subprocess.run(["mount", "-o", "remount,size=4m", "tmpfs", small_disk], check=True)
    assert store.put_new("parts/large", bytes(2 << 20))
    assert store.get("parts/large") == bytes(2 << 20)
