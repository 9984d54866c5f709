"""What the evaluations of generating share: their options, and the way from arms to tables and files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import UserError

if TYPE_CHECKING:
    from jobs.evaluate.harness import Arm, Built, Real, Result, Seen, Table, View
    from jobs.evaluate.metrics import Measure
    from pipeline.store import Store

Classes = Annotated[
    list[str] | None, typer.Option("--class", help="A class of tangram. May be repeated; by default all.")
]
Runner = Annotated[str, typer.Option(metavar="ray|local", help="Where the builds are made.")]
Workers = Annotated[str, typer.Option(metavar="N|auto", help="How many workers.")]
Quick = Annotated[bool, typer.Option("--quick", help="Next to nothing of everything, for tests.")]

REAL = "real drawings"


def known(classes: Sequence[str] | None, default: Sequence[str]) -> tuple[str, ...]:
    """The classes that are asked for, each once. Raises `UserError` for one that tangram does not have."""
    from jobs.tangram.drawings import CLASSES

    chosen = tuple(dict.fromkeys(classes or default))
    for label in chosen:
        if label not in CLASSES:
            raise UserError(f"--class {label!r}: tangram has no such class; allowed: {', '.join(CLASSES)}")
    return chosen


def references(out: Path, classes: Sequence[str], per_class: int) -> Path:
    """Drawings that nothing was trained on, as an image folder."""
    from jobs.tangram.drawings import write_references

    folder = out / "references"
    if not (folder / classes[-1] / f"{per_class - 1:04d}.png").exists():
        write_references(folder, classes, per_class)
    return folder


def arm(
    name: str,
    folder: Path,
    classes: Any,
    recipe: Mapping[str, Any],
    count: int,
    batch: int,
    **further: Any,
) -> Arm:
    """An arm of one recipe. Unless said otherwise it has no filter and one attempt: what the method makes.

    A recipe that names no `unit` has units of a batch.
    """
    from jobs.evaluate.harness import Arm

    target = {"classes": classes, "accepted": count, "attempts": 1, **further.pop("target", {})}
    return Arm(
        name,
        {
            "name": name,
            "references": {"uri": str(folder)},
            "recipes": {"made": {"unit": batch, **recipe, "batch": batch}},
            "targets": [target],
            "shard": {"image": "png"},
            **further,
        },
    )


def make(arms: Sequence[Arm], out: Path, runner: str, workers: str) -> tuple[Store, dict[str, Built], str]:
    """Build the arms below a folder, or find them built: their store, the builds, and how long it took."""
    from jobs.evaluate import harness
    from pipeline.store import Store

    begin, store = time.monotonic(), str(out / "builds")
    run = {"runner": runner, "workers": int(workers) if workers.isdecimal() else workers}
    built = harness.make(arms, store, run)
    told = (
        f"building: {time.monotonic() - begin:.0f} s now, {sum(b.seconds for b in built.values()):.0f} s in"
        " the runs that completed the builds"
    )
    return Store(store), built, told


def conclude(
    out: Path,
    name: str,
    arms: Sequence[Arm],
    tables: Sequence[Table],
    headings: Mapping[str, Any],
    notes: Sequence[str],
    *,
    classes: Sequence[str],
    real: int,
    runner: str,
    workers: str,
    further: Callable[[Built | None, Seen, Real], Mapping[str, Measure]] = lambda built, seen, real: {},
    pictures: Callable[[Mapping[str, Built]], Sequence[Path]] = lambda built: (),
    remarks: Callable[[Sequence[Result]], Sequence[str]] = lambda results: (),
) -> None:
    """Build the arms, measure their images, write and print what came out.

    A table may have the row `REAL`: other fresh drawings in the numbers of the first arm.
    """
    from jobs.evaluate.harness import Real, drawn_like, look, tabulate
    from jobs.evaluate.metrics import Observers
    from jobs.evaluate.report import write

    store, built, building = make(arms, out, runner, workers)
    begin = time.monotonic()
    observers = Observers()
    seen = {title: look(store, one, observers) for title, one in built.items()}
    seen[REAL] = drawn_like(seen[arms[0].name], observers)
    fresh = Real.seen_by(observers, classes, real)

    def more(view: View, images: Seen) -> Mapping[str, Measure]:
        return further(built.get(view.arm), images, fresh)

    results = [tabulate(table, seen, fresh, built, more) for table in tables]
    sheets = pictures(built)
    measuring = time.monotonic() - begin
    told = f"{building}; measuring: {measuring:.0f} s"
    files = write(out, name, results, headings, [*remarks(results), *notes, told])
    print("\n".join(str(file) for file in [*files, *sheets]))


def mean(values: Any, groups: Sequence[Any]) -> Measure:
    """The mean of a number over images, or the share of what is true, with the bootstrap's interval."""
    import numpy as np

    from jobs.evaluate.metrics import estimate, mean_of, resamples

    return estimate(mean_of(np.array(values, dtype=np.float64)), resamples(groups), len(set(groups)))
