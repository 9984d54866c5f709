"""`seedloom evaluate hard-negatives`: GeNIe at every noise ratio, and GeNIe-Ada, on confusable classes.

Koohpayegani et al., arXiv:2312.02548: Table 5 (do the images keep their label?), and Figures 2 and 6 (where
between source and target do they lie?). Each target class is drawn from images of the classes with which
tangram's classifier confuses it most. Sources, noise and prompts are the same at every ratio, so all rows are
paired. The judge says whether an image shows its target; the classifier says how near it is to the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from jobs.evaluate import study

if TYPE_CHECKING:
    from PIL.Image import Image

    from jobs.evaluate.harness import Built, Seen, Table
    from jobs.evaluate.metrics import Measure
    from pipeline.store import Store

RATIOS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ADA = "genie_ada"
ADA_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
# An image lies near the boundary when the classifier gives source and target together more than this, and the
# one no more than this above the other.
NEAR = 0.5
CELL, GAP, LINE, LABEL = 72, 4, 20, 150  # pixels of the contact sheet


@dataclass(frozen=True, kw_only=True)
class Size:
    references: int  # a class
    images: int  # a class
    sources: int  # classes that each class is made from
    steps: int
    guidance: float
    batch: int
    real: int


FULL = Size(references=10, images=6, sources=3, steps=50, guidance=4.0, batch=6, real=100)
QUICK = Size(references=2, images=2, sources=1, steps=10, guidance=1.0, batch=2, real=8)


def hard_negatives(
    out: Annotated[Path, typer.Option(help="Folder of builds and results.")] = Path(
        "out/evaluate/hard-negatives"
    ),
    classes: study.Classes = None,
    runner: study.Runner = "ray",
    workers: study.Workers = "auto",
    quick: study.Quick = False,
) -> None:
    """GeNIe per noise ratio and GeNIe-Ada: label kept, probabilities of source and target, the boundary."""
    from jobs.tangram.drawings import CLASSES

    size = QUICK if quick else FULL
    chosen = study.known(classes, CLASSES[::8] if quick else CLASSES)
    folder = study.references(out, chosen, size.references)
    sources = confused(folder, chosen, size.sources)

    def arm(name: str, generate: Mapping[str, Any]) -> Any:
        settings = {"steps": size.steps, "guidance": size.guidance}
        return study.arm(
            name, folder, list(chosen), {"generate": {**generate, **settings}}, size.images, size.batch,
            target={"sources": sources},
        )  # fmt: skip

    arms = [arm(f"r = {ratio}", {"method": "genie", "ratio": ratio}) for ratio in RATIOS]
    arms.append(arm(ADA, {"method": "genie_ada", "ratios": list(ADA_RATIOS)}))
    study.conclude(
        out, "hard-negatives", arms, tables([a.name for a in arms], size), headings(),
        [
            f"{len(chosen)} classes, {size.images} images each from {size.sources} most confused classes;"
            f" the same sources and noise at every ratio. r = 1 is plain prompting.",
            "p(target), p(source): tangram's classifier, mean. Near the boundary: the two are more than"
            f" {NEAR} together, and differ by less than {NEAR}.",
            f"GeNIe-Ada chooses among {', '.join(map(str, ADA_RATIOS))} by the features of the same"
            " classifier; the judge is another network, trained apart.",
        ],
        classes=chosen, real=size.real, runner=runner, workers=workers,
        further=lambda built, seen, real: between(seen), pictures=lambda built: sheets(out, built),
    )  # fmt: skip


def confused(folder: Path, classes: Sequence[str], count: int) -> dict[str, list[str]]:
    """Class → the other classes that tangram's classifier takes it for most, or them for it."""
    from jobs.evaluate.confusion import shares
    from pipeline.config import parse
    from pipeline.goals import most_confused

    target = {"classes": "all", "accepted": 1}
    config = parse(
        {"output": "-", "references": {"uri": str(folder)}, "targets": [target]}, "evaluate hard-negatives"
    )
    rows = shares(config, "tangram")
    labels = {row["class"] for row in rows}
    return {label: list(found) for label, found in most_confused(rows, count, labels).items()}


def between(seen: Seen) -> dict[str, Measure]:
    """Where images lie between the class that they started from and the one that they should show."""
    from jobs.tangram.drawings import CLASSES

    if not seen.rows:  # real drawings
        return {}
    place_N = np.arange(len(seen.rows))
    source_N = np.array([CLASSES.index(row["source_class"]) for row in seen.rows])
    target_N = np.array([CLASSES.index(row["class"]) for row in seen.rows])
    p_target_N = seen.features.probability_NK[place_N, target_N]
    p_source_N = seen.features.probability_NK[place_N, source_N]
    found = {
        "still_source": seen.features.verdict_N == source_N,
        "p_target": p_target_N,
        "p_source": p_source_N,
        "near": (p_target_N + p_source_N > NEAR) & (np.abs(p_target_N - p_source_N) < NEAR),
        "ratio": [row["noise_ratio"] for row in seen.rows],
    }
    return {name: study.mean(values, seen.groups) for name, values in found.items()}


def tables(names: Sequence[str], size: Size) -> list[Table]:
    from jobs.evaluate.harness import Table, View

    rows = {name: View(name) for name in names} | {study.REAL: View(study.REAL)}
    asked = tuple((ADA, name) for name in names if name != ADA)
    title = f"{size.steps} steps, guidance {size.guidance}"
    return [Table("hard negatives", title, rows, asked, ("accuracy", "still_source", "near"))]


def headings() -> dict[str, Any]:
    from jobs.evaluate.report import Heading

    return {
        "accuracy": Heading("judge: target", ".3f"),
        "still_source": Heading("judge: source", ".3f"),
        "p_target": Heading("p(target)", ".3f"),
        "p_source": Heading("p(source)", ".3f"),
        "near": Heading("near the boundary", ".3f"),
        "ratio": Heading("mean r", ".2f"),
        "frechet_judge": Heading("Fréchet, judge", ".2f", biased=True),
        "frechet_clip": Heading("Fréchet, CLIP", ".1f", biased=True),
        "diversity": Heading("diversity", ".3f"),
    }


# --- pictures -----------------------------------------------------------------------------------------------


def sheets(out: Path, built: Mapping[str, Built]) -> list[Path]:
    """trajectory.png: d_m of all that GeNIe-Ada made; hard_negatives.png: sources, ratios, its choice."""
    rows = _rows(built)
    _trajectories([row for row, _ in rows[ADA].values()]).savefig(out / "trajectory.png", dpi=110)
    _contact(rows, built).save(out / "hard_negatives.png")
    return [out / "trajectory.png", out / "hard_negatives.png"]


def _rows(built: Mapping[str, Built]) -> dict[str, dict[tuple[str, int], tuple[dict[str, Any], bytes]]]:
    """Arm → (class, candidate) → its row and image."""
    from jobs.evaluate.harness import read

    return {
        name: {(row["class"], row["index"]): (row, data) for row, data in read(_store(one), one)}
        for name, one in built.items()
    }


def _trajectories(rows: Sequence[Mapping[str, Any]]) -> Any:
    """How far each image has gone from source to target at each ratio, and where the choice fell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(page)
    curves, counts = page.subplots(1, 2, width_ratios=(2, 1))
    for row in rows:
        curves.plot(ADA_RATIOS, row["generate_trace"], color="#1f77b4", linewidth=0.6, alpha=0.35)
        chosen = ADA_RATIOS.index(row["noise_ratio"])
        curves.plot(row["noise_ratio"], row["generate_trace"][chosen], "o", color="#c0392b", markersize=2.5)
    mean = np.mean([row["generate_trace"] for row in rows], axis=0)
    curves.plot(ADA_RATIOS, mean, color="black", linewidth=2, label=f"mean of {len(rows)}")
    curves.set_xlabel("noise ratio r")
    curves.set_ylabel("d, from source to target")
    curves.legend(fontsize=8)
    counts.bar(
        [str(r) for r in ADA_RATIOS],
        [sum(row["noise_ratio"] == r for row in rows) for r in ADA_RATIOS],
        color="#c0392b",
    )
    counts.set_xlabel("chosen r")
    counts.set_ylabel("images")
    return page


def _contact(rows: Mapping[str, Any], built: Mapping[str, Built]) -> Image:
    """The first candidate of each class: its source, every ratio, and in red what GeNIe-Ada chose."""
    from PIL import Image as images_of
    from PIL import ImageDraw, ImageFont

    from pipeline.references import fetch
    from stages.images import decode

    font = ImageFont.load_default(13)
    shown = sorted(key for key in rows[ADA] if key[1] == min(k[1] for k in rows[ADA] if k[0] == key[0]))
    columns = ["source", *(f"r = {ratio}" for ratio in RATIOS)]
    size = (LABEL + len(columns) * (CELL + GAP), LINE + len(shown) * (CELL + GAP))
    page = images_of.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        pen.text((LABEL + column * (CELL + GAP), GAP), name, "gray", font)
    for line, key in enumerate(shown):
        row, _ = rows[ADA][key]
        top = LINE + line * (CELL + GAP)
        pen.text((GAP, top + CELL // 3), f"{row['source_class']}\nto {key[0]}", "black", font)
        source = fetch(_store(built[ADA]), row["source"])
        pictures = [source, *(rows[name][key][1] if key in rows[name] else b"" for name in columns[1:])]
        for column, data in enumerate(pictures):
            if not data:
                continue
            corner = (LABEL + column * (CELL + GAP), top)
            page.paste(decode(data).resize((CELL, CELL), images_of.Resampling.LANCZOS), corner)
            if columns[column] == f"r = {row['noise_ratio']}":
                pen.rectangle(
                    (*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), outline="#c0392b", width=3
                )
    return page


def _store(built: Built) -> Store:
    from pipeline.store import Store

    return Store(built.plan.config.output)


if __name__ == "__main__":
    from jobs.entry import run

    run(hard_negatives)
