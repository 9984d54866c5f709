"""The contact sheet of a build: per target, references beside accepted and rejected candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.show.page import CAPTION, CELL, FAINT, GAP, GREEN, INK, MARGIN, PAPER, RED, square

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = (("references", 4), ("accepted", 8), ("rejected", 4))  # heading, images a row


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
    for name, target in manifest.targets.items():
        accounts = target.recipes.values()
        counts = {
            "references": target.admitted,
            "accepted": sum(r.accepted for r in accounts),
            "rejected": sum(sum(r.rejected.values()) for r in accounts),
        }
        failed, missing = sum(r.failed for r in accounts), sum(r.missing for r in accounts)
        note = (f"  ·  {failed} failed" if failed else "") + (f"  ·  short by {missing}" if missing else "")
        heading = plan.config.readable(target.label) if name == target.label else name
        pen.text((MARGIN, y), heading + note, INK, bold)
        x = MARGIN
        pictures = _pictures(store, plan, name, target.label, rows)
        for verdict, columns in COLUMNS:
            colour = {"accepted": GREEN, "rejected": RED}.get(verdict, FAINT)
            shown = f"{counts[verdict]} {verdict}" if verdict in counts else verdict
            pen.text((x, y + CAPTION), shown, colour, font)
            for place, picture in enumerate(pictures[verdict][: rows * columns]):
                corner = (
                    x + place % columns * (CELL + GAP),
                    y + 2 * CAPTION + place // columns * (CELL + GAP),
                )
                page.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), corner)
                if verdict == "rejected":
                    pen.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), outline=RED, width=2)
            x += columns * (CELL + GAP) + MARGIN
        y += block
    return page


def _pictures(store: Any, plan: Any, target: str, label: str, rows: int) -> dict[str, list[Image]]:
    """Heading → the first images of a target, in candidate order."""
    from pipeline.distinct import told_of
    from pipeline.pack import read_unit
    from pipeline.parts import account
    from pipeline.references import fetch, reference_name
    from pipeline.select import FAILED, PASSED
    from stages.images import decode

    told = told_of(store, plan.build_id).rejected
    wanted = {name: rows * columns for name, columns in COLUMNS}
    found: dict[str, list[Image]] = {name: [] for name in wanted}
    streams = [s for s in plan.streams if s.target == target]
    # what candidates start from says more of them than the other images of their class
    used = list(dict.fromkeys(r for s in streams for r in s.sources)) or plan.lock.classes.get(label, ())
    for reference in used[: wanted["references"]]:
        # only references that a recipe used are kept in the store
        if store.exists(reference_name(reference.sha256)):
            found["references"].append(square(decode(fetch(store, reference.sha256))))
    for stream in streams:
        owed = stream.quota
        for unit in range(stream.max_units):
            judged = account(store, stream, unit)
            if judged is None or owed <= 0:
                break
            candidates = read_unit(store, plan, stream.id, unit)
            for candidate, outcome in zip(candidates, judged.outcomes, strict=True):
                if outcome == PASSED and candidate["key"] in told:
                    outcome = told[candidate["key"]].rule
                if outcome == FAILED or (outcome == PASSED and owed <= 0):
                    continue  # the latter is surplus
                owed -= outcome == PASSED
                name = "accepted" if outcome == PASSED else "rejected"
                if len(found[name]) < wanted[name]:
                    found[name].append(decode(candidate["image"]))
    return found
