"""`seedloom plan FILE --pilot N`: a forecast from a small build of N candidates of each target.

The pilot is a build like any other, in the folder `pilot/` beneath the output: run again it goes on or finds
that nothing is left to do, and the folder can be removed. What it measures, of every target and recipe:

- the share of candidates that are accepted or surplus, with Wilson's 95 % interval;
- device time: that of its units, stretched so that all of them fill the time for which workers were held.
  A device is a GPU, or a worker where there is none;
- bytes of parts, scores and shards.

From these follows what the quota takes. Candidates come in whole units, and at most as many as `attempts`
allows. Their interval is that of the share together with the chance of the build itself: the candidates until
the q-th success have the variance q (1 - p) / p². Intervals of sums add up those of their parts, which is too
wide rather than too narrow. What is done once for all (models, inversion, artifacts) is not multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.errors import UserError

FOLDER = "pilot"
Z = 1.96
WIDTH = 132  # of the tables: intervals that are cut short say nothing


@dataclass(frozen=True)
class Measured:
    """What the pilot saw of one target and recipe."""

    candidates: int
    passed: int
    seconds: float | None  # of a device, for one candidate; None: not on record
    candidate_bytes: float
    sample_bytes: float  # of an accepted image in its shard


@dataclass(frozen=True)
class Span:
    """An expected number with its 95 % interval."""

    middle: float
    low: float
    high: float

    def __mul__(self, factor: float) -> Span:
        return Span(self.middle * factor, self.low * factor, self.high * factor)

    def __add__(self, other: Span) -> Span:
        return Span(self.middle + other.middle, self.low + other.low, self.high + other.high)


def run_pilot(config: Any, number: int) -> dict[str, Any]:
    """Build the pilot and say what the whole build takes. Raises `UserError`."""
    from jobs.build import make_runner
    from pipeline.build import build, resolve
    from pipeline.telemetry import logged, telemetry

    if number < 1:
        raise UserError(f"--pilot {number}: allowed is a whole number from 1 up")
    uri = f"{config.output.rstrip('/')}/{FOLDER}"
    # with one attempt for each image of the quota, all N are looked at
    targets = tuple(t.model_copy(update={"accepted": number, "attempts": 1.0}) for t in config.targets)
    small = config.model_copy(update={"output": uri, "targets": targets})
    screen = telemetry("auto")
    try:
        with logged(screen):
            result = build(small, screen, make_runner)
    finally:
        screen.close()
    store, plan = resolve(small)
    _, whole = resolve(config.model_copy(update={"output": uri}))  # it has what `batch: auto` chose
    facts = _run_facts(store, plan)
    measured = _measured(store, plan, result.manifest, facts)
    rows = [
        {"target": s.target, "recipe": s.recipe, **forecast(s, measured[s.target, s.recipe])}
        for s in whole.streams
    ]
    once = facts["once_seconds"]
    return summed(rows, once, config.run.price_per_device_hour) | {
        "folder": uri,
        "build": result.manifest.build_id,
        "compared": any(s.pairwise for s in whole.streams),
    }


def _run_facts(store: Any, plan: Any) -> dict[str, Any]:
    """Stream → device seconds for a unit, and those spent once; empty when the run is not on record."""
    from schemas.sealed import unseal

    name = f"{plan.build_folder}/run.json"
    try:
        run = unseal(store.get(name), f"{store.uri}/{name}")
    except FileNotFoundError:  # it was stopped between the manifest and this
        return {"unit_seconds": {}, "once_seconds": None}
    gpus = plan.config.run.gpus_per_worker if run["device"].startswith("cuda") else 1
    devices = run["workers"] * gpus
    busy = sum(stream["seconds"] for stream in run["streams"].values())
    held = run["seconds"].get("generate", 0) * devices
    stretch = held / busy if busy else 1
    once = sum(run["seconds"].get(step, 0) for step in ("start", "invert", "assess", "prepare"))
    return {
        "unit_seconds": {n: s["seconds"] / s["units"] * stretch for n, s in run["streams"].items()},
        "once_seconds": once * devices,
    }


def _measured(
    store: Any, plan: Any, manifest: Any, facts: Mapping[str, Any]
) -> dict[tuple[str, str], Measured]:
    sample_bytes = sum(s.tar_bytes + s.parquet_bytes for s in manifest.shards) / max(manifest.samples, 1)
    known = facts["unit_seconds"]
    found = {}
    for stream in plan.streams:
        account = manifest.targets[stream.target].recipes[stream.recipe]
        kept = [f"parts/{stream.id}", *(f"scores/{stream.id}/{f.id}" for f in stream.filters)]
        size = sum(stored.size for folder in kept for stored in store.walk(folder))
        # a run that went on from an earlier one may have made no unit of this stream: others tell
        alike = [known[s.id] / s.unit for s in plan.streams if s.recipe == stream.recipe and s.id in known]
        seconds = known[stream.id] / stream.unit if stream.id in known else _mean(alike)
        passed = account.accepted + account.surplus
        each = size / max(account.candidates, 1)
        found[stream.target, stream.recipe] = Measured(
            account.candidates, passed, seconds, each, sample_bytes or each
        )
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def forecast(stream: Any, seen: Measured) -> dict[str, Any]:
    """What one target and recipe take: rates, candidates, accepted images, device seconds and bytes."""
    from jobs.tangram.evaluate import wilson

    if not seen.candidates:  # its share of N is none
        low, high, rate = 0.0, 1.0, None
    else:
        low, high = wilson(seen.passed, seen.candidates)
        rate = seen.passed / seen.candidates
    quota, unit, most = stream.quota, stream.unit, stream.max_units * stream.unit
    needed = Span(*(_candidates(quota, p, unit, most, z) for p, z in ((rate or 0, 0), (high, -Z), (low, Z))))
    accepted = Span(*(min(quota, p * most) for p in (rate or 0, low, high)))
    return {
        "quota": quota,
        "pilot_candidates": seen.candidates,
        "pilot_passed": seen.passed,
        "rate": Span(rate or 0, max(low, 0), min(high, 1)),
        "candidates": needed,
        "candidates_at_most": most,
        "accepted": accepted,
        "seconds": None if seen.seconds is None else needed * seen.seconds,
        "bytes": needed * seen.candidate_bytes + accepted * seen.sample_bytes,
    }


def _candidates(quota: int, rate: float, unit: int, most: int, z: float) -> float:
    """Candidates until the quota is full, in whole units; `z` standard deviations off the mean."""
    if rate <= 0:
        return float(most)
    mean, deviation = quota / rate, math.sqrt(quota * max(0.0, 1 - rate)) / rate
    units = math.ceil(max(quota, mean + z * deviation) / unit - 1e-9)
    return float(min(units * unit, most))


def summed(rows: list[dict[str, Any]], once: float | None, price: float | None) -> dict[str, Any]:
    """The forecast of the whole build as plain data: its rows, and their sum with what is done once."""
    timed = once is not None and all(row["seconds"] is not None for row in rows)
    whole: dict[str, Any] = {
        key: _sum(row[key] for row in rows) for key in ("candidates", "accepted", "bytes")
    }
    whole["quota"] = sum(row["quota"] for row in rows)
    whole["seconds"] = _sum(row["seconds"] for row in rows) + Span(*[once or 0] * 3) if timed else None
    return {
        "rows": [_plain(row, price) for row in rows],
        "all": _plain(whole, price),
        "once_device_hours": None if once is None else once / 3600,
        "price_per_device_hour": price,
    }


def _sum(spans: Iterable[Span]) -> Span:
    total = Span(0, 0, 0)
    for span in spans:
        total += span
    return total


def _plain(row: Mapping[str, Any], price: float | None) -> dict[str, Any]:
    found = {key: list(vars(v).values()) if isinstance(v, Span) else v for key, v in row.items()}
    seconds = found.pop("seconds")
    found["device_hours"] = None if seconds is None else [s / 3600 for s in seconds]
    if price is not None:
        found["cost"] = None if seconds is None else [s / 3600 * price for s in seconds]
    count = row["accepted"].middle
    each = {"candidates": found["candidates"], "device_seconds": seconds, "bytes": found["bytes"]}
    if price is not None:
        each["cost"] = found["cost"]
    # nothing accepted has no price
    found["per_accepted"] = {key: v[0] / count if v and count else None for key, v in each.items()}
    return found


# --- printing --------------------------------------------------------------------------------------------


def show(facts: Mapping[str, Any], size: Any) -> None:
    """Print two tables: in all, and for each accepted image. `size` writes bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    priced = facts["price_per_device_hour"] is not None
    rows = [*facts["rows"], {"target": "all", "recipe": "", **facts["all"]}]
    whole = Table(box=None, pad_edge=False, title="in all, with 95 % intervals", title_justify="left")
    each = Table(box=None, pad_edge=False, title="for each accepted image", title_justify="left")
    names = ("pilot", "rate", "quota", "accepted", "candidates", "device-hours", "bytes")
    _columns(whole, *names, priced=priced)
    _columns(each, "candidates", "device-seconds", "bytes", priced=priced)
    for row in rows:
        pilot = f"{row['pilot_passed']} of {row['pilot_candidates']}" if "rate" in row else ""
        cells = [
            pilot,
            _span(row.get("rate"), "{:.2f}") if "rate" in row else "",
            str(row["quota"]),
            f"{row['accepted'][0]:.0f}",
            _span(row["candidates"], "{:.0f}"),
            _span(row["device_hours"], "{:.3g}"),
            size(row["bytes"][0]),
        ]
        cells += [_span(row["cost"], "{:.3g}")] if priced else []
        whole.add_row(row["target"], row["recipe"], *cells)
        own = row["per_accepted"]
        cells = [_one(own["candidates"], "{:.2f}"), _one(own["device_seconds"], "{:.3g}")]
        cells += ["–" if own["bytes"] is None else size(own["bytes"])]
        cells += [_one(own["cost"], "{:.3g}")] if priced else []
        each.add_row(row["target"], row["recipe"], *cells)
    console.print(whole)
    console.print(each)
    if facts["once_device_hours"] is None:
        console.print("times of the pilot are not on record; remove its folder and run it again")
    else:
        console.print(f"of it once for all targets: {facts['once_device_hours']:.3g} device-hours")
    for row in facts["rows"]:
        if row["accepted"][0] < row["quota"]:
            console.print(
                f"warning: {row['target']} / {row['recipe']} may end short of its quota: at most"
                f" {row['candidates_at_most']} candidates are tried; set targets.*.attempts higher"
            )
    if facts["compared"]:
        console.print("the more images are accepted, the more are duplicates: a pilot sees fewer of them")
    console.print(f"pilot build {facts['build']}: {facts['folder']} (may be removed)")


def _columns(table: Any, *names: str, priced: bool) -> None:
    table.add_column("target")
    table.add_column("recipe")
    for name in (*names, *(["cost"] if priced else [])):
        table.add_column(name, justify="right")


def _one(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _span(span: list[float] | None, form: str) -> str:
    if span is None:
        return "–"
    middle, low, high = (form.format(v) for v in span)
    return f"{middle} [{low}–{high}]"
