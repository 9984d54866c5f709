"""A worker: what holds its device, and what does not."""

from __future__ import annotations

from pipeline.build import resolve
from pipeline.config import load
from pipeline.tasks import UnitReceipt, UnitTask
from pipeline.worker import Worker
from stages import images
from tests.small_build import make_config


def test_the_device_is_free_while_images_are_encoded_and_decoded(tmp_path, monkeypatch):
    config = load(make_config(tmp_path))
    _, plan = resolve(config)
    stream = plan.streams[0]
    worker = Worker(plan, config.output)
    held: dict[str, set[bool]] = {}

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments):
            held.setdefault(name, set()).add(worker.device._lock.locked())
            return original(*arguments)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in [
        (images, "encode"), (images, "decode"), (worker.store, "put_new"),
        (worker.backbone, "predict"), (stream.filters[0].method, "score"),
    ]:  # fmt: skip
        watch(owner, name)
    receipt = worker.run(UnitTask(stream.id, 0))
    assert isinstance(receipt, UnitReceipt)
    assert receipt.seconds > 0
    assert held == {
        "encode": {False}, "decode": {False}, "put_new": {False}, "predict": {True}, "score": {True}
    }  # fmt: skip
