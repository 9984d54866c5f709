"""`seedloom plan FILE`: what a build would do, and what is there already. Loads no model, writes nothing.

With `--pilot N` it also makes a small build and forecasts (`jobs.pilot`).
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from jobs.options import ConfigFile, Json, Overrides

MEASURED = 64  # parts, to say how many bytes a candidate takes


def plan(
    file: ConfigFile,
    overrides: Overrides = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Make N candidates of each target, in OUTPUT/pilot, and forecast acceptance, device-hours,"
            " bytes and cost.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Targets, quotas, candidates at most, units, bytes, and what is there already."""
    from jobs.pilot import run_pilot, show
    from pipeline.config import load

    config = load(file, overrides or [])
    forecast = None if pilot is None else run_pilot(config, pilot)
    facts = describe(config) | ({"pilot": forecast} if forecast else {})
    if json:
        import json as json_library

        print(json_library.dumps(facts))
        return
    _print(facts)
    if forecast:
        show(forecast, _size)


def describe(config: Any) -> dict[str, Any]:
    """The plan as plain data."""
    from pipeline.batches import undecided
    from pipeline.build import resolve, survey
    from pipeline.ledger import existing
    from pipeline.parts import part_name
    from pipeline.store import side_by_side

    store, made = resolve(config)
    state = survey(store, made, lambda line: print(line, file=sys.stderr))
    manifest = existing(store, made)
    least = most = 0
    seen: list[tuple[str, int]] = []  # parts, by name and number of candidates
    streams: list[dict[str, Any]] = []
    for stream in made.streams:
        known, there = state.streams[stream.id], state.generated[stream.id]
        seen += [(part_name(stream, unit), stream.unit) for unit in there[:4]]
        selection, needed = known.select(), known.pending
        least += needed * stream.unit
        most += stream.max_units * stream.unit
        streams.append(
            {
                "target": stream.target,
                "recipe": stream.recipe,
                "quota": stream.quota,
                "references": len({*stream.references, *stream.sources}),
                "units": stream.max_units,
                "candidates_at_most": stream.max_units * stream.unit,
                "units_there": len(there),
                "units_scored": len(known.units()),
                "accepted_there": len(selection.accepted),
                "units_needed": needed,
                # a unit that overshoots its quota by more than half of itself wastes more than it keeps
                "mostly_surplus": stream.quota * 2 < stream.unit,
            }
        )
    seen = seen[:MEASURED]
    part_bytes = sum(side_by_side(lambda part: store.fs.size(store.path(part[0])), seen))
    candidates_seen = sum(candidates for _, candidates in seen)
    bytes_each = part_bytes / candidates_seen if candidates_seen else _estimate(made)
    return {
        "build": made.build_id,
        "complete": manifest is not None,
        "undecided": sorted(undecided(made)),
        "references": made.lock.account(),
        "streams": streams,
        "seeds_to_invert": _seeds_missing(store, made),
        "bytes_at_least": round(least * bytes_each),
        "bytes_at_most": round(most * bytes_each),
        "bytes_measured": candidates_seen > 0,
    }


def _seeds_missing(store: Any, made: Any) -> int:
    from pipeline.seeds import seed_name
    from pipeline.store import side_by_side

    wanted = {seed_name(s.seeds, r) for s in made.streams if s.seeds for r in s.references}
    folders = {name.rpartition("/")[0] for name in wanted}
    there = side_by_side(lambda folder: {f"{folder}/{name}" for name in store.list(folder)}, folders)
    return len(wanted.difference(*there))


def _estimate(made: Any) -> float:
    """Bytes of a candidate before any was made: half a byte a pixel, as a photograph at JPEG 95."""
    from stages.backbones.diffusion.load import native_size

    return 0.5 * native_size(made.config.backbone) ** 2 + 500


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None)
    table = Table(box=None, pad_edge=False)
    for name in (
        "target",
        "recipe",
        "quota",
        "refs",
        "candidates ≤",
        "units ≤",
        "there",
        "needed",
        "accepted",
    ):
        table.add_column(name, justify="left" if name in ("target", "recipe") else "right")
    for s in facts["streams"]:
        table.add_row(
            s["target"], s["recipe"], str(s["quota"]), str(s["references"]), str(s["candidates_at_most"]),
            str(s["units"]), str(s["units_there"]), str(s["units_needed"]), str(s["accepted_there"]),
        )  # fmt: skip
    console.print(table)
    refused = sum(n["quarantined"] for n in facts["references"].values())
    admitted = sum(n["admitted"] for n in facts["references"].values())
    console.print(
        f"references: {admitted} admitted, {refused} quarantined; {facts['seeds_to_invert']} seeds to invert"
    )
    kind = "measured on parts that exist" if facts["bytes_measured"] else "estimated"
    console.print(
        f"still to generate: at least {_size(facts['bytes_at_least'])},"
        f" in all at most {_size(facts['bytes_at_most'])} ({kind})"
    )
    for s in facts["streams"]:
        if s["mostly_surplus"]:
            console.print(
                f"warning: {s['target']} / {s['recipe']} asks for {s['quota']} images, but a unit makes"
                f" more than twice as many; set recipes.{s['recipe']}.unit lower"
            )
    for name in facts["undecided"]:
        console.print(
            f"recipe {name}: batch auto is chosen when the build starts; until then it cannot be known"
            " what is there already, and the build has another name"
        )
    state = "complete, nothing to do" if facts["complete"] else "not complete"
    console.print(f"build {facts['build']}: {state}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    from jobs.entry import run

    run(plan)
