"""What Prometheus sees of a build that runs on Ray: every metric, its meaning and its tags, in one place.

Ray puts `ray_` before the names and `_total` behind those of counters, and serves them on every node. All
have the tags `dataset` (the config's name) and `build`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ray.util.metrics import Counter, Gauge

from pipeline.plan import Plan
from pipeline.telemetry import Tally, Telemetry

TAGS = ("dataset", "build")
GAUGES = {
    "seedloom_accepted": "Accepted images so far, over all targets.",
    "seedloom_rejected": "Candidates that a filter rejected, over all targets.",
    "seedloom_failed": "Candidates that failed, over all targets.",
    "seedloom_queue_depth": "What this phase has still to do, as far as is known: seeds, units or shards.",
    "seedloom_workers": "Workers with their models loaded.",
    "seedloom_images_per_second": "Candidates generated a second, in the last minute.",
    "seedloom_device_busy_share": "Share of the workers' time that their devices worked on units, in the last"
    " minute.",
}
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "seedloom_restarts": ("Workers that were lost or ended, and replaced where there was room.", ()),
    "seedloom_retries": ("Tasks tried again after an unexpected error or a time-out.", ()),
    "seedloom_store_retries": ("Operations of workers on the store that were tried again.", ()),
    "seedloom_stage_seconds": (
        "Seconds of devices for invert, prepare, combine, refine, generate, filter; of workers for pack.",
        ("stage",),
    ),
}
WINDOW = 60.0  # seconds


class Metrics:
    """The metrics of one build, in one process that is connected to Ray."""

    def __init__(self, plan: Plan):
        self._tags = {"dataset": plan.config.name, "build": plan.build_id}
        self._gauges = {name: Gauge(name, text, TAGS) for name, text in GAUGES.items()}
        self._counters = {n: Counter(n, text, (*TAGS, *more)) for n, (text, more) in COUNTERS.items()}

    def set(self, **values: float) -> None:
        """Gauges by their name without `seedloom_`."""
        for name, value in values.items():
            self._gauges[f"seedloom_{name}"].set(value, self._tags)

    def add(self, name: str, value: float = 1, **tags: str) -> None:
        if value > 0:
            self._counters[f"seedloom_{name}"].inc(value, {**self._tags, **tags})


class Measured:
    """Telemetry whose counts become metrics too, as soon as there are some."""

    def __init__(self, telemetry: Telemetry, metrics: Callable[[], Metrics | None]):
        self._telemetry, self._metrics = telemetry, metrics
        self._known: dict[str, Tally] = {}
        self._sums = dict.fromkeys(("accepted", "rejected", "failed"), 0)
        self._done = self._total = 0

    def _set(self, **values: float) -> None:
        if metrics := self._metrics():
            metrics.set(**values)

    def say(self, text: str, **facts: Any) -> None:
        self._telemetry.say(text, **facts)

    def phase(self, name: str, total: int) -> None:
        self._done, self._total = 0, total
        self._telemetry.phase(name, total)
        self._set(queue_depth=total)

    def advance(self, items: int, total: int | None = None) -> None:
        self._done, self._total = self._done + items, total or self._total
        self._telemetry.advance(items, total)
        self._set(queue_depth=max(self._total - self._done, 0))

    def tallies(self, tallies: dict[str, Tally]) -> None:
        self._telemetry.tallies(tallies)
        for target, tally in tallies.items():
            before = self._known.get(target, Tally(0))
            for name in self._sums:
                self._sums[name] += getattr(tally, name) - getattr(before, name)
        self._known |= tallies
        self._set(**self._sums)

    def close(self) -> None:
        self._telemetry.close()


class Pace:
    """How fast the last minute was, from sums that only grow."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, float, float]] = deque()

    def look(self, images: float, busy: float, available: float) -> tuple[float, float]:
        """Images a second, and the share of the available seconds that were busy ones."""
        now = time.monotonic()
        self._seen.append((now, images, busy, available))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()
        then, *before = self._seen[0]
        seconds, capacity = now - then, available - before[2]
        speed = (images - before[0]) / seconds if seconds else 0.0
        return speed, (busy - before[1]) / capacity if capacity else 0.0
