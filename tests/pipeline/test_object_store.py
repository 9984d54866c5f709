"""Builds on a real S3 endpoint over HTTP, and what happens when it fails: nothing is lost or silent."""

from __future__ import annotations

import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import pipeline.store
from pipeline.build import build
from pipeline.config import load
from pipeline.lease import Lease
from pipeline.store import Store, passing
from schemas.errors import UserError
from tests.fault_proxy import FaultProxy
from tests.local_build import HASH, Silent, config, packed, run
from tests.small_build import shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone", "quick")


@pytest.fixture(scope="module")
def endpoint():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def proxy(endpoint, monkeypatch):
    """The endpoint behind a proxy that can be told to fail; clients learn of it from the environment."""
    import s3fs

    with FaultProxy(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits for long."""
    import s3fs

    monkeypatch.setattr(pipeline.store, "GIVE_UP", 6.0)
    monkeypatch.setattr(pipeline.store, "GIVE_UP_AT_ONCE", 6.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "connect_timeout", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the client, beside ours


@pytest.fixture
def uri(endpoint, proxy) -> str:
    bucket = f"b{uuid.uuid4().hex[:12]}"
    # neither through the proxy nor in the haste of the clients under test
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=60).close()
    return f"s3://{bucket}/data"


@pytest.fixture
def small_parts(monkeypatch):
    """Large is what has more than 10 MiB, sent 5 MiB by 5 MiB; else it were 100 and 50."""
    import s3fs

    pipe = s3fs.S3FileSystem._pipe_file

    async def in_parts(self, path, data, chunksize=0, **given):
        return await pipe(self, path, data, chunksize=5 * 2**20, **given)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", in_parts)


# --- the store ---------------------------------------------------------------------------------------------


def test_put_if_absent_is_honoured_by_many_at_once(uri):
    Store(uri).probe()
    with ThreadPoolExecutor(8) as threads:
        wrote = list(threads.map(lambda n: Store(uri).put_new("parts/1", b"%d" % n), range(8)))
    assert sum(wrote) == 1
    assert Store(uri).get("parts/1") == b"%d" % wrote.index(True)


@pytest.mark.parametrize("sort", ["503", "500", "reset", "hang"])
@pytest.mark.parametrize("operation", ["get", "put", "list", "exists"])
def test_what_passes_is_tried_again(uri, proxy, sort, operation):
    store = Store(uri)
    store.put_new("parts/0", b"there")
    proxy.order(sort, path="parts" if operation != "list" else "list-type|parts", times=2)
    match operation:
        case "get":
            assert store.get("parts/0") == b"there"
        case "put":
            assert store.put_new("parts/1", b"new")
        case "list":
            assert list(store.list("parts")) == ["0"]
        case "exists":
            assert store.exists("parts/0")
    assert len(proxy.struck) == 2
    assert store.retries >= 1


def test_an_object_that_is_not_there_is_asked_for_once(uri, proxy):
    store = Store(uri)
    proxy.calm()
    with pytest.raises(FileNotFoundError):
        store.get("parts/none")
    assert not store.exists("parts/none")
    assert list(store.list("nowhere")) == []
    assert store.retries == 0
    assert len(proxy.requests) <= 6  # a look at the object and one at the folder, each time


def test_what_is_refused_is_one_line_at_once(uri, proxy):
    store = Store(uri)
    proxy.order("403", path="parts/", times=99)
    begin = time.monotonic()
    for step in (lambda: store.get("parts/1"), lambda: store.put_new("parts/1", b"x")):
        with pytest.raises(
            UserError, match=r"the store refuses .* check the address, the credentials"
        ) as told:
            step()
        assert "\n" not in str(told.value)
    assert store.retries == 0
    assert time.monotonic() - begin < pipeline.store.GIVE_UP


def test_a_bucket_that_is_not_there_is_one_line(proxy):
    with pytest.raises(UserError, match=r"cannot be written .*create the bucket, or name another output"):
        Store("s3://there-is-no-such-bucket/data").probe()


def test_a_store_that_does_not_come_back_is_given_up(uri, proxy):
    store = Store(uri)
    proxy.order("503", times=10_000)
    with pytest.raises(UserError, match=r"no answer for 6 s .* run the same command again"):
        store.get("parts/1")
    assert store.retries > 1


def test_an_answer_that_comes_slowly_is_whole(uri, proxy):
    store = Store(uri)
    data = bytes(range(256)) * 400
    store.put_new("parts/1", data)
    proxy.order("drip", "GET", "parts/1")
    assert store.get("parts/1") == data
    assert len(proxy.struck) == 1


def test_a_write_whose_answer_is_lost_is_there_once(uri, proxy):
    store = Store(uri)
    proxy.order("lose", "PUT", "parts/1")
    assert not store.put_new("parts/1", b"mine")  # it was there, when it was tried again
    assert store.get("parts/1") == b"mine"
    assert len([r for r in proxy.requests if r.startswith("PUT") and "parts/1" in r]) == 2


def test_a_lease_whose_answer_is_lost_is_held(uri, proxy):
    proxy.order("lose", "PUT", r"leases/x/1\.json")
    begin = time.monotonic()
    with Lease(Store(uri), "x", 60) as lease:
        assert lease.epoch == 1
    assert time.monotonic() - begin < 60  # nobody waited for a sign of life of its own


def test_a_large_object_is_sent_in_parts_and_once(small_parts, uri, proxy):
    store = Store(uri)
    data = b"0123456789abcdef" * (12 * 2**16)  # 12 MiB
    proxy.order("503", "PUT", "partNumber=2")
    assert store.put_new("shards/1.tar", data)
    assert store.get("shards/1.tar") == data
    assert store.get_range("shards/1.tar", 6 * 2**20, 16) == data[6 * 2**20 : 6 * 2**20 + 16]
    assert any("partNumber=3" in r for r in proxy.requests)
    assert not store.put_new("shards/1.tar", b"other" + data)
    assert store.get("shards/1.tar") == data


def test_a_large_object_that_fails_for_good_is_not_there_at_all(small_parts, uri, proxy):
    proxy.order("403", "PUT", "partNumber=2", times=99)
    with pytest.raises(UserError, match="the store refuses"):
        Store(uri).put_new("shards/1.tar", bytes(11 * 2**20))
    proxy.calm()
    assert not Store(uri).exists("shards/1.tar")
    assert list(Store(uri).list("shards")) == []


def test_more_names_than_a_page_holds_are_listed(uri):
    store = Store(uri)
    names = [f"{n:06d}" for n in range(1100)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda name: store.put_new(f"many/{name}", b"x"), names))
    assert list(store.list("many")) == names
    assert len(list(store.walk("many"))) == 1100


def test_what_another_wrote_is_seen_at_once(uri):
    ours, theirs = Store(uri), Store(uri)
    assert list(ours.list("parts")) == []
    assert not ours.exists("parts/1")
    theirs.put_new("parts/1", b"x")
    assert list(ours.list("parts")) == ["1"]
    assert ours.exists("parts/1")


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (TimeoutError(), True), (ConnectionResetError(), True), (OSError(16, "SlowDown"), True),
        (OSError(5, "InternalError"), True), (PermissionError("403"), False), (FileNotFoundError(), False),
        (FileExistsError(), False), (OSError(22, "InvalidBucketName"), False), (ValueError(), False),
        (KeyboardInterrupt(), False), (OSError("damaged"), False),
    ],
)  # fmt: skip
def test_what_may_pass(error, may_pass):
    assert passing(error) == may_pass


# --- builds ------------------------------------------------------------------------------------------------


def made(tmp_path, **changes):
    return config(tmp_path, recipes={"plain": sketch_recipe()}, filter=[{"method": HASH, "least": 0.3}],
                  targets=[{"classes": ["circle", "gear"], "accepted": 8}], **changes)  # fmt: skip


def test_a_build_through_every_fault_has_the_shards_of_a_calm_one(tmp_path, uri, proxy, monkeypatch):
    monkeypatch.setattr(pipeline.store, "GIVE_UP", 60.0)
    calm = run(made(tmp_path / "calm")).manifest
    faults = (
        ("503", "PUT", "parts/"), ("500", "PUT", "scores/"), ("reset", "PUT", "shards/"),
        ("hang", "GET", "parts/"), ("lose", "PUT", r"leases/.*json"), ("lose", "PUT", "history/"),
        ("lose", "PUT", "parts/.*000001"), ("drip", "GET", "scores/"),
    )  # fmt: skip
    for fault in faults:
        proxy.order(*fault)
    result = run(made(tmp_path, output=uri))
    assert shard_hashes(result.manifest) == shard_hashes(calm)
    assert len(proxy.struck) == len(faults)
    assert not run(made(tmp_path, output=uri)).made
    assert packed(made(tmp_path, output=uri)).manifest == result.manifest


def test_a_build_that_is_cut_off_goes_on_where_it_was(tmp_path, uri, proxy):
    calm = run(made(tmp_path / "calm")).manifest
    path = made(tmp_path, output=uri)
    proxy.order("403", "PUT", "parts/.*000001", times=9)
    with pytest.raises(UserError, match="the store refuses"):
        build(load(path), Silent(), _runner)
    proxy.calm()
    there = set(Store(uri).walk("parts"))
    assert there
    assert shard_hashes(run(path).manifest) == shard_hashes(calm)
    assert there <= set(Store(uri).walk("parts"))


def _runner(plan, uri):
    from jobs.build import make_runner

    return make_runner(plan, uri)


def test_every_command_reads_it(tmp_path, uri, seedloom):
    path = made(tmp_path, output=uri)
    assert seedloom("build", path).code == 0
    for command in (
        ("status", uri), ("verify", "--deep", uri), ("plan", path), ("diff", uri, uri),
        ("prune", uri, "--dry-run"), ("show", uri, "--out", tmp_path / "sheet.png"),
        ("report", uri, "--out", tmp_path / "report.html"), ("pack", path),
    ):  # fmt: skip
        ended = seedloom(*command)
        assert ended.code == 0, (command, ended.err)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
