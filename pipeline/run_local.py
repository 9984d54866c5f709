"""The local runner: one worker in this process, one task after another."""

from __future__ import annotations

from pipeline.plan import Plan
from pipeline.tasks import Work
from pipeline.worker import Worker


class LocalRunner:
    def __init__(self, plan: Plan, uri: str):
        self.plan, self.uri = plan, uri
        self.workers = 1

    def __enter__(self) -> LocalRunner:
        self.worker = Worker(self.plan, self.uri)
        return self

    def __exit__(self, *error: object) -> None:
        del self.worker

    def run(self, work: Work) -> None:
        while (task := work.next()) is not None:
            work.done(task, self.worker.run(task))
