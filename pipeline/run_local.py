"""The local runner: one worker in this process, one task after another."""

from __future__ import annotations

import time

from pipeline.plan import Plan
from pipeline.tasks import UnitTask, Work
from pipeline.telemetry import Telemetry
from pipeline.worker import Worker


class LocalRunner:
    expected: int | None = None

    def __init__(self, plan: Plan, uri: str):
        self.plan, self.uri = plan, uri
        self.workers = 1
        self.worker_seconds = 0.0
        self.restarts = self.retries = 0

    def watch(self, telemetry: Telemetry) -> Telemetry:
        return telemetry

    def __enter__(self) -> LocalRunner:
        self.worker = Worker(self.plan, self.uri)
        return self

    def __exit__(self, *error: object) -> None:
        del self.worker

    def run(self, work: Work) -> None:
        while (task := work.next()) is not None:
            started = time.monotonic()
            work.done(task, self.worker.run(task))
            if isinstance(task, UnitTask):
                self.worker_seconds += time.monotonic() - started
