"""Errors, lack of memory, Ctrl-C and damage: what a build calls a failure, and what it says when it stops."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.dag import out_of_memory
from schemas.errors import Interrupted, UserError
from stages.contract import Generated
from tests.local_build import HASH, accounts, config, fresh, rows, run
from tests.small_build import Sketch, parts_of, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


@pytest.fixture
def trouble(monkeypatch):
    """Let the first calls of `Sketch` raise: `trouble(error, …)`; returns the list that is worked off."""
    draw = Sketch.__call__

    def start(*errors: BaseException | None) -> list[BaseException | None]:
        waiting = list(errors)

        def call(self, backbone, models, order):
            if waiting and (error := waiting.pop(0)):
                raise error
            return draw(self, backbone, models, order)

        monkeypatch.setattr(Sketch, "__call__", call)
        return waiting

    return start


ONE = {"targets": [{"classes": ["circle"], "accepted": 6}]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_error_that_does_not_come_again_is_no_failure(tmp_path, trouble, count):
    """One fails a batch, two a batch and a candidate alone, three two candidates alone."""
    path = config(tmp_path, **ONE)
    other = fresh(tmp_path, path)[0].manifest
    waiting = trouble(*[RuntimeError("a hiccup")] * count)
    assert run(path).manifest == other
    assert waiting == []


def test_an_error_that_comes_twice_is_a_failure(tmp_path, trouble):
    hiccup = RuntimeError("no good\nsecond line")
    # the batch of candidates 0 and 1, then 0 alone; the batch of 2 and 3; then the whole again
    trouble(hiccup, hiccup, None, None, hiccup, hiccup)
    result = run(config(tmp_path, **ONE))
    (account,) = accounts(result).values()
    assert account.failed == 1
    first = rows(tmp_path / "out")
    assert [row["error"] for row in first if row["error"]] == ["RuntimeError: no good"]


def test_errors_that_are_never_the_same_end_the_build(tmp_path, trouble):
    waiting = trouble(*[RuntimeError(str(n)) for n in range(200)])
    with pytest.raises(RuntimeError, match=r"circle / plain raises another error each time"):
        run(config(tmp_path, **ONE))
    assert waiting


def test_where_every_candidate_fails_nothing_is_committed(tmp_path):
    poisoned = {"method": "tests.small_build:Poisoned", "share": 1}
    path = config(tmp_path, recipes={"plain": sketch_recipe(generate=poisoned)}, **ONE)
    with pytest.raises(RuntimeError, match=r"every candidate of circle / plain failed: ValueError: poison"):
        run(path)
    assert parts_of(tmp_path / "out") == set()
    assert not list((tmp_path / "out").glob("builds/*/manifest.json"))


@pytest.mark.parametrize("picture", [float("nan"), 0.3])
def test_an_image_that_shows_nothing_is_a_failure(tmp_path, monkeypatch, picture):
    draw = Sketch.__call__

    def call(self, backbone, models, order):
        image_B3hw = draw(self, backbone, models, order).image_B3hw
        good_B111 = (order.z_BCHW[:, 0, 0, 0] > 0)[:, None, None, None]
        return Generated(torch.where(good_B111, image_B3hw, picture))

    monkeypatch.setattr(Sketch, "__call__", call)
    result = run(config(tmp_path, **ONE))
    (account,) = accounts(result).values()
    assert account.failed > 0
    wanted = "the image is not finite" if picture != 0.3 else "the image is flat"
    assert all(wanted in row["error"] for row in rows(tmp_path / "out") if row["status"] == "failed")


@pytest.mark.parametrize(
    "lack",
    [
        torch.cuda.OutOfMemoryError("no more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda lack: type(lack).__name__,
)
def test_out_of_memory_names_the_batch_to_set_and_loses_nothing(tmp_path, trouble, lack):
    path = config(tmp_path, **ONE)
    other = fresh(tmp_path, path)[0].manifest
    trouble(None, None, None, *[lack] * 9)  # the first unit is made, and half of the second
    with pytest.raises(UserError, match=r"out of memory at batch 2; set recipes\.plain\.batch=1"):
        run(path)
    parts = parts_of(tmp_path / "out")
    assert len(parts) == 1
    trouble()
    assert run(path).manifest == other
    assert parts < parts_of(tmp_path / "out")


@pytest.mark.parametrize(("unit", "batch", "smaller"), [(12, 6, 4), (5, 5, 1), (16, 16, 8), (6, 3, 2)])
def test_the_batch_to_set_is_one_that_a_unit_can_have(unit, batch, smaller):
    stream = SimpleNamespace(unit=unit, batch=batch, recipe="plain")
    told = out_of_memory(stream, MemoryError())
    assert f"recipes.plain.batch={smaller} " in str(told)
    assert "more memory" in str(out_of_memory(SimpleNamespace(batch=1, recipe="plain"), MemoryError()))


def test_out_of_memory_while_scoring_names_the_batch_too(tmp_path, monkeypatch):
    def lacking(self, models, image_B3hw, question):
        raise torch.cuda.OutOfMemoryError("no more")

    path = config(tmp_path, filter=[HASH], **ONE)
    other = fresh(tmp_path, path)[0].manifest
    with monkeypatch.context() as patch:
        patch.setattr("tests.small_build.HashFilter.score", lacking)
        with pytest.raises(UserError, match=r"out of memory at batch 2; set recipes\.plain\.batch=1"):
            run(path)
    assert run(path).manifest == other


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_ctrl_c_says_how_to_go_on_and_loses_nothing(tmp_path, trouble, calls):
    path = config(tmp_path)
    other = fresh(tmp_path, path)[0].manifest
    trouble(*[None] * calls, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="Run the same command again to go on"):
        run(path)
    parts = parts_of(tmp_path / "out")
    result = run(path)
    assert result.manifest == other
    assert parts <= parts_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["parts", "scores"])
def test_a_damaged_part_is_named_in_one_line(tmp_path, seedloom, kind):
    path = config(tmp_path)
    run(path)
    table = pq.read_table(
        next((tmp_path / "out" / "builds").rglob("000000.parquet")), columns=["stream", "unit"]
    )
    sample = table.to_pylist()[0]  # of a part that packing reads
    shutil.rmtree(tmp_path / "out" / "builds")
    victim = next((tmp_path / "out" / kind / sample["stream"]).rglob(f"{sample['unit']:06d}.parquet"))
    data = victim.read_bytes()
    middle = len(data) // 2
    victim.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    for command in ("build", "pack"):
        ended = seedloom(command, path)
        assert ended.code == 4
        assert f"{victim}: damaged" in ended.err.splitlines()[-1]
        assert ended.err.endswith("remove it and build again\n")
    assert not list((tmp_path / "out").glob("builds/*/manifest.json"))
    victim.unlink()
    assert run(path).manifest == fresh(tmp_path, path)[0].manifest
