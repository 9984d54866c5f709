"""`seedloom evaluate minority`: MinorityPrompt and what it is compared with, on every class of tangram.

Um & Ye, arXiv:2410.07838: Table 1 (likelihood, CLIPScore, precision, recall, density, coverage) and Table 3
(in-batch similarity). All rows start from the same noise with the same prompts, so that they are paired.
Precision and recall: Kynkäänniemi et al., arXiv:1904.06991; density and coverage: Naeem et al.,
arXiv:2002.09797; both by the latter's package prdc, in the judge's features, to fresh drawings.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from jobs.evaluate import study

if TYPE_CHECKING:
    from jobs.evaluate.harness import Built, Real, Result, Seen, Table
    from jobs.evaluate.metrics import Measure

DDIM = "ddim"
METHODS: dict[str, dict[str, Any]] = {
    DDIM: {"method": "text_to_image"},
    "null prompt": {"method": "null_prompt"},
    "cads": {"method": "cads"},
    "sgms": {"method": "sgms"},
    "minority_prompt": {"method": "minority_prompt"},
    "minority_prompt, diversity": {"method": "minority_prompt", "objective": "diversity"},
}
MEASURED = {  # name of the figure → column of the rows
    "log2p": "likelihood_log2p_per_dim",
    "clip_score": "clip_score",
    "similarity": "similarity",
}
PRDC = ("precision", "recall", "density", "coverage")
NEAREST = 5  # neighbours, as in both papers
KEPT = 0.02  # a CLIPScore that falls by no more is kept


@dataclass(frozen=True, kw_only=True)
class Size:
    images: int  # a class
    steps: int
    guidance: float
    batch: int
    real: int
    likelihood_steps: int


FULL = Size(images=8, steps=50, guidance=4.0, batch=8, real=100, likelihood_steps=20)
QUICK = Size(images=2, steps=4, guidance=2.0, batch=2, real=8, likelihood_steps=2)


def minority(
    out: Annotated[Path, typer.Option(help="Folder of builds and results.")] = Path("out/evaluate/minority"),
    classes: study.Classes = None,
    runner: study.Runner = "ray",
    workers: study.Workers = "auto",
    quick: study.Quick = False,
) -> None:
    """Are its images less likely, do they keep to the prompt, and are they varied? Beside its rivals."""
    from jobs.tangram.drawings import CLASSES

    size = QUICK if quick else FULL
    chosen = study.known(classes, CLASSES[::8] if quick else CLASSES)
    folder = study.references(out, chosen, 1)  # a build needs none here, but names its classes by them
    measures = [{"method": "likelihood", "steps": size.likelihood_steps}, "clip_score", "similarity"]
    arms = [
        study.arm(
            name, folder, list(chosen),
            {"generate": {**method, "steps": size.steps, "guidance": size.guidance}},
            size.images, size.batch, measure=measures,
        )
        for name, method in METHODS.items()
    ]  # fmt: skip
    study.conclude(
        out, "minority", arms, tables(size), headings(),
        [
            f"{len(chosen)} classes, {size.images} images each, from the same noise in every row.",
            "log2 p per dimension: of the image's latent, by the probability-flow ODE of the model with the"
            f" prompt of the class, {size.likelihood_steps} steps. Rarer images are lower, as in the paper.",
            f"precision, recall, density, coverage: {NEAREST} neighbours in the judge's features,"
            " to as many fresh drawings. They depend on n and have no interval.",
        ],
        classes=chosen, real=size.real, runner=runner, workers=workers,
        further=further, remarks=verdict,
    )  # fmt: skip


def further(built: Built | None, seen: Seen, real: Real) -> dict[str, Measure]:
    """What the build measured of each image, and how its set lies to the drawings."""
    from prdc import compute_prdc

    from jobs.evaluate.metrics import Measure

    found = {}
    if seen.rows:
        for name, column in MEASURED.items():
            found[name] = study.mean([row[column] for row in seen.rows], seen.groups)
    # as many drawings of each class as images: recall and coverage depend on the numbers of both
    counts = Counter(label for label, _, _ in seen.keys)
    real_ND = np.concatenate([real.features[label].judge_ND[:count] for label, count in counts.items()])
    nearest = min(NEAREST, len(real_ND) - 2)  # prdc sorts the image itself and one more
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
        values = compute_prdc(real_ND, seen.features.judge_ND, nearest_k=nearest)
    dimensions = real_ND.shape[1]
    return found | {
        name: Measure(float(values[name]), None, None, len(seen.keys), dimensions) for name in PRDC
    }


def tables(size: Size) -> list[Table]:
    from jobs.evaluate.harness import Table, View

    rows = {name: View(name) for name in METHODS} | {study.REAL: View(study.REAL)}
    asked = tuple((name, DDIM) for name in METHODS if name != DDIM)
    title = f"{size.steps} steps, guidance {size.guidance}"
    return [Table("minority", title, rows, asked, (*MEASURED, "accuracy"))]


def headings() -> dict[str, Any]:
    from jobs.evaluate.report import Heading

    return {
        "log2p": Heading("log2 p per dim", ".3f"),
        "clip_score": Heading("CLIPScore", ".2f"),
        "accuracy": Heading("judge accuracy", ".3f"),
        **{name: Heading(name, ".3f") for name in PRDC},
        "similarity": Heading("in-batch similarity", ".3f"),
        "diversity": Heading("diversity", ".3f"),
        "frechet_judge": Heading("Fréchet, judge", ".2f", biased=True),
        "frechet_clip": Heading("Fréchet, CLIP", ".1f", biased=True),
    }


def verdict(results: Sequence[Result]) -> list[str]:
    """The paper's two claims, said either way."""
    (result,) = results
    told = []
    for name in METHODS:
        if name == DDIM:
            continue
        likelihood = result.differences[name, DDIM, "log2p"]
        says = {
            "lower": "less likely than",
            "higher": "likelier than",
            "not shown": "not shown to differ in likelihood from",
        }[likelihood.verdict]
        ours, theirs = (result.rows[row]["clip_score"].value for row in (name, DDIM))
        change = ours / theirs - 1
        kept = "kept within" if change >= -KEPT else "lost by more than"
        told.append(f"{name}: images are {says} DDIM's; CLIPScore {kept} {KEPT:.0%} ({change:+.1%})")
    return told


if __name__ == "__main__":
    from jobs.entry import run

    run(minority)
