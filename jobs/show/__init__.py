"""`seedloom show URI`: a contact sheet. Per target, references beside accepted and rejected candidates.

With `--subspace CLASS`, what the model draws in a plane through reference seeds of a class; with
`--trajectory TARGET`, how genie_ada chose the noise ratio of each candidate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import BuildId, Uri
from schemas.errors import UserError


def show(
    uri: Uri,
    build: BuildId = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("contact_sheet.png"),
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows of images for each target, 2; or of --trajectory, 8.", show_default=False
        ),
    ] = None,
    subspace: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Draw a plane through seeds of this class instead.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Images along each side of that plane.")] = 9,
    trajectory: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Draw instead by what genie_ada chose ratios: of a class, or of a pair 'SOURCE -> CLASS'.",
        ),
    ] = None,
) -> None:
    """Write a contact sheet of a build as a PNG."""
    from jobs.show.plane import plane
    from jobs.show.sheet import sheet
    from jobs.show.trajectory import draw, gather
    from pipeline.ledger import named, replan
    from pipeline.store import Store

    if subspace is not None and trajectory is not None:
        raise UserError("--subspace and --trajectory are two pictures: give one of them")
    store = Store(uri)
    manifest = named(store, build)
    plan = replan(store, manifest.build_id)
    if subspace is not None:
        picture = plane(plan, uri, subspace, points)
    elif trajectory is not None:
        picture = draw(gather(store, plan, trajectory, rows or 8))
    else:
        picture = sheet(store, manifest, plan, rows or 2)
    picture.save(out)
    print(out)
