"""`seedloom report URI`: a build as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import BuildId, Uri
from schemas.errors import UserError


def report(
    uri: Uri,
    build: BuildId = None,
    out: Annotated[
        Path, typer.Option(help="The page to write; further ones lie beside it.", dir_okay=False)
    ] = Path("report.html"),
    pages: Annotated[
        str,
        typer.Option(
            metavar="N|all", help="Pages of 1000 candidates; each is a fair sample, with all charts."
        ),
    ] = "1",
) -> None:
    """Write what was asked and what came out as a page to open in a browser."""
    from jobs.report.gather import CARDS, cards, gather
    from jobs.report.page import render
    from pipeline.ledger import named, replan
    from pipeline.store import Store

    if not (pages == "all" or (pages.isdecimal() and int(pages) > 0)):
        raise UserError(f"--pages {pages!r}: allowed are all, or a whole number from 1 up")
    store = Store(uri)
    manifest = named(store, build)
    plan = replan(store, manifest.build_id)
    gathered = gather(store, plan, None if pages == "all" else int(pages))
    possible = max(1, -(-gathered.total // CARDS))
    written = possible if pages == "all" else min(int(pages), possible)
    names = [out, *(out.with_stem(f"{out.stem}-{number}") for number in range(2, written + 1))]
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        shown = gathered.places[number * CARDS : (number + 1) * CARDS]
        found = cards(store, uri, manifest, plan, shown)
        page = render(store, manifest, plan, gathered, found, number, [n.name for n in names])
        name.write_text(page, encoding="utf-8")
        print(name)
    if written < possible:
        print(f"{written * CARDS} of {gathered.total} candidates; the others with --pages all")


if __name__ == "__main__":
    from jobs.entry import run

    run(report)
