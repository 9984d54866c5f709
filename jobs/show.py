"""`seedloom show URI`: a contact sheet. Per target, references beside accepted and rejected candidates.

With `--subspace CLASS`, what the model draws in a plane through reference seeds of a class.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import BuildId, Uri
from schemas.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, GAP, CAPTION, MARGIN = 72, 4, 18, 16  # pixels
EXTENT = 2**0.5  # of the plane: as far from the middle as independent seeds are
COLUMNS = (("references", 4), ("accepted", 8), ("rejected", 4))  # heading, images a row
INK, PAPER, FAINT, RED, GREEN = "#1d1f21", "#ffffff", "#8a8f94", "#c0392b", "#2e8b57"


def show(
    uri: Uri,
    build: BuildId = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("contact_sheet.png"),
    rows: Annotated[int, typer.Option(min=1, help="Rows of images for each target.")] = 2,
    subspace: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Draw a plane through seeds of this class instead.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Images along each side of that plane.")] = 9,
) -> None:
    """Write a contact sheet of a build as a PNG."""
    from pipeline.ledger import named, replan
    from pipeline.store import Store

    store = Store(uri)
    manifest = named(store, build)
    plan = replan(store, manifest)
    picture = plane(plan, uri, subspace, points) if subspace else sheet(store, manifest, plan, rows)
    picture.save(out)
    print(out)


def plane(plan: Any, uri: str, label: str, points: int) -> Image:
    """points × points images from the plane through the first three seeds of a class, their centroid amid.

    Great circles are straight lines in it. Seeds that are independent lie at √2 from the middle: the first
    half-way down the right edge, the two others on the left, above and below.
    """
    import torch
    from PIL import Image

    from pipeline.worker import Worker
    from stages.combine.subspace import grid
    from stages.images import to_uint8

    stream = next((s for s in plan.streams if s.label == label and s.seeds), None)
    if stream is None:
        known = ", ".join(sorted({s.label for s in plan.streams if s.seeds})) or "none"
        raise UserError(f"--subspace {label!r}: no recipe of this class has seeds; classes that do: {known}")
    worker = Worker(plan, uri)
    seeds = worker.materials(stream.id).seeds
    assert seeds is not None
    if len(seeds.references) < 3:
        raise UserError(f"--subspace {label!r}: a plane needs 3 seeds, there are {len(seeds.references)}")
    z_NCHW = grid(seeds.z_KCHW[:3], points, EXTENT).flatten(0, 1).float()
    page = None
    for start in range(0, len(z_NCHW), stream.batch):
        batch = z_NCHW[start : start + stream.batch]
        filled = torch.cat([batch, batch[:1].expand(stream.batch - len(batch), -1, -1, -1)])
        image_B3hw = worker.dags[stream.recipe].generate(
            worker.backbone, filled.to(worker.device), stream.prompt
        )
        for place, pixels_hw3 in enumerate(to_uint8(image_B3hw)[: len(batch)], start):
            side = pixels_hw3.shape[0]
            page = page or Image.new("RGB", (points * side, points * side))
            page.paste(Image.fromarray(pixels_hw3), (place % points * side, place // points * side))
    assert page is not None
    return page


def sheet(store: Any, manifest: Any, plan: Any, rows: int) -> Image:
    """The contact sheet. Reads references, shards' parts and scores from the store."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    block = rows * (CELL + GAP) + CAPTION * 2 + MARGIN
    width = MARGIN * 4 + sum(n * (CELL + GAP) for _, n in COLUMNS)
    height = MARGIN * 2 + CAPTION * 2 + block * len(manifest.targets)
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    title = f"{manifest.name} · {manifest.samples} samples · build {manifest.build_id}"
    pen.text((MARGIN, MARGIN), title, INK, bold)
    y = MARGIN * 2 + CAPTION
    for label, target in manifest.targets.items():
        accounts = target.recipes.values()
        counts = {
            "references": target.admitted,
            "accepted": sum(r.accepted for r in accounts),
            "rejected": sum(sum(r.rejected.values()) for r in accounts),
        }
        failed, missing = sum(r.failed for r in accounts), sum(r.missing for r in accounts)
        note = (f"  ·  {failed} failed" if failed else "") + (f"  ·  short by {missing}" if missing else "")
        pen.text((MARGIN, y), plan.config.readable(label) + note, INK, bold)
        x = MARGIN
        pictures = _pictures(store, plan, label, rows)
        for name, columns in COLUMNS:
            colour = {"accepted": GREEN, "rejected": RED}.get(name, FAINT)
            pen.text((x, y + CAPTION), f"{counts[name]} {name}", colour, font)
            for place, picture in enumerate(pictures[name][: rows * columns]):
                corner = (
                    x + place % columns * (CELL + GAP),
                    y + 2 * CAPTION + place // columns * (CELL + GAP),
                )
                page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), corner)
                if name == "rejected":
                    pen.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), outline=RED, width=2)
            x += columns * (CELL + GAP) + MARGIN
        y += block
    return page


def _pictures(store: Any, plan: Any, label: str, rows: int) -> dict[str, list[Image]]:
    """Heading → the first images of a target, in candidate order."""
    from pipeline.pack import read_unit
    from pipeline.parts import account
    from pipeline.references import fetch, reference_name
    from pipeline.select import FAILED, PASSED
    from stages.images import decode

    wanted = {name: rows * columns for name, columns in COLUMNS}
    found: dict[str, list[Image]] = {name: [] for name in wanted}
    for reference in plan.lock.classes.get(label, ())[: wanted["references"]]:
        # only references that a recipe used are kept in the store
        if store.exists(reference_name(reference.sha256)):
            found["references"].append(_square(decode(fetch(store, reference.sha256))))
    for stream in (s for s in plan.streams if s.label == label):
        owed = stream.quota
        for unit in range(stream.max_units):
            judged = account(store, stream, unit)
            if judged is None or owed <= 0:
                break
            candidates = read_unit(store, plan, stream.id, unit)
            for candidate, outcome in zip(candidates, judged.outcomes, strict=True):
                if outcome == FAILED or (outcome == PASSED and owed <= 0):
                    continue  # the latter is surplus
                owed -= outcome == PASSED
                name = "accepted" if outcome == PASSED else "rejected"
                if len(found[name]) < wanted[name]:
                    found[name].append(decode(candidate["image"]))
    return found


def _square(image: Image) -> Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    from jobs.entry import run

    run(show)
