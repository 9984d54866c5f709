"""What the benchmarks share: ways that take turns, the memory that they take, and how figures are told."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Turn:
    """What a way gave and took."""

    result: Any  # of its first time, which also warms up and is not timed
    peak_bytes: int  # of that time
    seconds: tuple[float, ...]

    def spread(self) -> dict[str, float]:
        """The median of the times, and their range."""
        return {
            "seconds": statistics.median(self.seconds),
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
        }

    def faster(self, other: Turn) -> float:
        """How many times as fast as another way, as the median over turns."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def take_turns(ways: Mapping[str, Callable[[], Any]], runs: int, device: torch.device) -> dict[str, Turn]:
    """Each way once to warm up, then A B C, C B A, …, so that a slow minute meets all alike."""
    results, peaks = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        peak = Peak(device)
        results[name] = way()
        wait(device)
        peaks[name] = peak.bytes()
    for turn in range(runs):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            ways[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: Turn(results[name], peaks[name], tuple(seconds[name])) for name in ways}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """The most memory that is in use from here on: of a GPU what torch allocates, else of the process."""

    def __init__(self, device: torch.device):
        import torch

        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back

    def bytes(self) -> int:
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measured_on(device: torch.device, *libraries: str) -> dict[str, Any]:
    """Without this a figure means nothing."""
    import torch

    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions("torch", *libraries),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first two to the right."""
    rule = ["---" if n < 2 else "---:" for n in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def footer(facts: Mapping[str, Any]) -> str:
    """What was measured on, in a line."""
    libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    machine = f"{facts['device']}, {facts['hardware']}, threads: {facts['threads']}"
    return f"{machine}; {libraries}; {facts['date']}"


def peak_of(facts: Mapping[str, Any]) -> str:
    return "allocated on the GPU" if facts["device"] == "cuda" else "resident in the process"


def timed(way: Mapping[str, float]) -> str:
    """Median and range in seconds."""
    return f"{way['seconds']:.3g} ({way['fastest']:.3g} – {way['slowest']:.3g})"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


def tell(facts: Mapping[str, Any], text: str, out: Path) -> None:
    """Print the figures, and keep them as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(text)
    print(f"figures: {out}")
