"""What a person or a program sees while a build works: bars, plain lines, or JSON lines."""

from __future__ import annotations

import heapq
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

PLAIN_SECONDS = 10.0  # between progress lines when the output is not a terminal
BAR_SECONDS = 0.2  # between two looks at which targets have a bar
SHOWN = 12  # targets


@dataclass
class Tally:
    """Counts of one target so far."""

    quota: int
    accepted: int = 0
    rejected: int = 0
    failed: int = 0


def lacking_most(tallies: Mapping[str, Tally]) -> list[str]:
    """The few targets that lack the largest share of their quota, by name."""
    return sorted(
        heapq.nsmallest(SHOWN, tallies, key=lambda name: tallies[name].accepted / tallies[name].quota)
    )


class Telemetry(Protocol):
    def say(self, text: str, **facts: Any) -> None:
        """Something worth a line."""
        ...

    def phase(self, name: str, total: int) -> None:
        """A phase begins: so many items to do."""
        ...

    def advance(self, items: int, total: int | None = None) -> None:
        """So many more are done; `total` when there turned out to be more to do."""
        ...

    def tallies(self, tallies: dict[str, Tally]) -> None:
        """The counts of targets, all at first and then those that change."""
        ...

    def close(self) -> None: ...


def telemetry(mode: Literal["auto", "plain", "json"]) -> Telemetry:
    """auto: bars on a terminal, plain lines elsewhere."""
    if mode == "json":
        return JsonLines()
    return Bars() if mode == "auto" and sys.stderr.isatty() else PlainLines()


@contextmanager
def logged(telemetry: Telemetry) -> Iterator[None]:
    """What the pipeline logs is said too: warnings, how many workers there are; as JSON, all of it."""
    logger, handler = logging.getLogger("seedloom"), _Saying(telemetry)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if isinstance(telemetry, JsonLines) else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


class _Saying(logging.Handler):
    def __init__(self, telemetry: Telemetry):
        super().__init__()
        self._telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        facts = getattr(record, "facts", {})
        self._telemetry.say(record.getMessage(), level=record.levelname.lower(), **facts)


class JsonLines:
    """One JSON object a line on standard output. All that follow it name the build that a line named."""

    def __init__(self) -> None:
        self._build: dict[str, str] = {}

    def _emit(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **self._build, **facts}
        print(json.dumps(line), flush=True)

    def say(self, text: str, **facts: Any) -> None:
        if "build" in facts:
            self._build = {"build": facts["build"]}
        self._emit("message", text=text, **facts)

    def phase(self, name: str, total: int) -> None:
        self._name, self._done, self._total = name, 0, total
        self._emit("phase", phase=name, total=total)

    def advance(self, items: int, total: int | None = None) -> None:
        self._done += items
        self._total = total or self._total
        self._emit("progress", phase=self._name, done=self._done, total=self._total)

    def tallies(self, tallies: dict[str, Tally]) -> None:
        self._emit("targets", targets={name: vars(tally) for name, tally in tallies.items()})

    def close(self) -> None:
        pass


class PlainLines:
    """A line for each phase, and one for progress every ten seconds, on standard error.

    It tells of the targets that lack most.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._printed = 0.0

    def say(self, text: str, **facts: Any) -> None:
        print(text, file=sys.stderr, flush=True)

    def phase(self, name: str, total: int) -> None:
        self._name, self._done, self._total = name, 0, total
        self._started = self._printed = time.monotonic()
        self.say(f"{name}: {total} to do")

    def advance(self, items: int, total: int | None = None) -> None:
        self._done += items
        self._total = total or self._total
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS or self._done >= self._total:
            self._printed = now
            rate = self._done / max(now - self._started, 1e-9)
            line = f"{self._name}: {self._done}/{self._total}, {rate:.2f}/s"
            if self._tallies:
                shown = {name: self._tallies[name] for name in lacking_most(self._tallies)}
                line += "; " + ", ".join(
                    f"{name} {t.accepted}/{t.quota} accepted {t.rejected} rejected {t.failed} failed"
                    for name, t in shown.items()
                )
                if more := len(self._tallies) - len(shown):
                    line += f"; and {more} more"
            self.say(line)

    def tallies(self, tallies: dict[str, Tally]) -> None:
        self._tallies |= tallies

    def close(self) -> None:
        pass


class Bars:
    """One bar for the phase and one for each target (those that lack most), on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._phase: Any = None
        self._targets: dict[str, Any] = {}
        self._tallies: dict[str, Tally] = {}
        self._drawn = 0.0
        self._progress.start()

    def say(self, text: str, **facts: Any) -> None:
        self._progress.console.print(text, markup=False)

    def phase(self, name: str, total: int) -> None:
        self._draw()  # the last of the phase before
        if self._phase is not None:
            self._progress.remove_task(self._phase)
        self._phase = self._progress.add_task(f"[bold]{name}", total=total, note="")

    def advance(self, items: int, total: int | None = None) -> None:
        self._progress.update(self._phase, advance=items, total=total)
        speed = self._progress.tasks[self._progress.task_ids.index(self._phase)].speed
        self._progress.update(self._phase, note=f"{speed:.2f}/s" if speed else "")

    def tallies(self, tallies: dict[str, Tally]) -> None:
        self._tallies |= tallies
        if time.monotonic() - self._drawn > BAR_SECONDS:
            self._draw()

    def _draw(self) -> None:
        from rich.markup import escape

        lacking = lacking_most(self._tallies)
        for name in set(self._targets) - set(lacking):
            self._progress.remove_task(self._targets.pop(name))
        for name in lacking:
            tally = self._tallies[name]
            if name not in self._targets:
                self._targets[name] = self._progress.add_task(f"  {escape(name)}", total=tally.quota, note="")
            note = f"accepted · {tally.rejected} rejected · {tally.failed} failed"
            self._progress.update(self._targets[name], completed=min(tally.accepted, tally.quota), note=note)
        self._drawn = time.monotonic()

    def close(self) -> None:
        self._draw()
        self._progress.stop()
