"""`seedloom evaluate rare`: SeedSelect and where it starts from, on frequent and on rare classes.

Samuel et al. (NAO), NeurIPS 2023, Table 2: accuracy on the many, medium and few classes of a long tail,
Fréchet distance, and the seconds of initialising and of optimising; for plain prompting, for centroids and
paths as they come, and for each of them refined by SeedSelect. Arms are builds without a filter.

"Iterations to acceptance" is counted by the judge: the first iteration after which the image, drawn with the
full sampler, shows its class. For it the same starts are refined with 1, 2, … iterations, one build each.
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
    from jobs.evaluate.harness import Built, Seen, Table
    from jobs.evaluate.metrics import Measure

PLAIN = "plain prompting"
STARTS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "euclidean": {"method": "euclidean", "group": 5},
    "normalized": {"method": "normalized", "group": 5},
    "nao centroid": {"method": "nao", "mode": "centroid", "group": 5},
    "cog path": {"method": "cog", "points": 3},
    "nao path": {"method": "nao", "points": 3},
}
REFINED = " + SeedSelect"
# The published form pleases CLIP more than the judge; so a cheaper gradient, and several views.
REFINE = {"method": "seedselect", "gradient": "truncated", "views": 4}
PUBLISHED = " + SeedSelect, published"
# The starts of which iterations are counted: noise, as SeedSelect does, and the paths that NAO and COG offer.
COUNTED = (PLAIN, "cog path", "nao path")
JUDGED = "until accepted: "
DECIDED = "decided: "  # more images of the rarest classes, to decide what the other arms leave open


@dataclass(frozen=True, kw_only=True)
class Size:
    references: int  # a class
    images: int  # a class
    decided: int  # a class, of plain prompting with and without SeedSelect
    steps: int
    iterations: int
    limit: int  # iterations within which an image is to be accepted
    batch: int
    real: int


FULL = Size(references=25, images=6, decided=24, steps=20, iterations=5, limit=10, batch=6, real=100)
QUICK = Size(references=5, images=3, decided=3, steps=3, iterations=1, limit=1, batch=3, real=8)


def rare(
    out: Annotated[Path, typer.Option(help="Folder of builds and results.")] = Path("out/evaluate/rare"),
    classes: study.Classes = None,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of classifier-free guidance.")] = 3.0,
    runner: study.Runner = "ray",
    workers: study.Workers = "auto",
    quick: study.Quick = False,
) -> None:
    """Plain prompting, centroids and paths, alone and with SeedSelect: accuracy by how rare a class is."""
    from jobs.tangram.drawings import CLASSES, RARE
    from stages.backbones.weights import TANGRAM

    size = QUICK if quick else FULL
    chosen = study.known(classes, CLASSES[::8] if quick else CLASSES)
    few = [label for label in chosen if label in RARE] or list(chosen)
    folder = study.references(out, chosen, size.references)

    def arm(
        name: str, start: str, refine: Mapping[str, Any] | None, labels: Sequence[str], images: int
    ) -> Any:
        recipe: dict[str, Any] = {
            "generate": {"method": "text_to_image", "steps": size.steps, "guidance": guidance}
        }
        if STARTS[start] is not None:
            recipe |= {"combine": STARTS[start], "invert": {"method": "fixed_point", "steps": size.steps}}
        if refine is not None:
            recipe["refine"] = refine
        return study.arm(name, folder, list(labels), recipe, images, size.batch)

    arms = [arm(start, start, None, chosen, size.images) for start in STARTS]
    refine = {**REFINE, "iterations": size.iterations}
    arms += [arm(start + REFINED, start, refine, chosen, size.images) for start in STARTS]
    published = {"method": "seedselect", "iterations": size.iterations}
    arms.append(arm(PLAIN + PUBLISHED, PLAIN, published, few, size.images))
    judged = {"classifier": str(TANGRAM / "judge"), "probability": 0.5}
    counted = {**REFINE, "iterations": size.limit + 1, "stop": judged}  # looked at before each of its steps
    arms += [arm(JUDGED + start, start, counted, few, size.images) for start in COUNTED]
    arms += [
        arm(DECIDED + name, PLAIN, refinement, few, size.decided)
        for name, refinement in ((PLAIN, None), (PLAIN + REFINED, refine))
    ]
    study.conclude(
        out, "rare", arms, tables(chosen, few, size, guidance), headings(),
        [
            f"{size.images} images a class, 5 references in a centroid, {size.iterations} iterations of"
            " SeedSelect with the gradient of the last three steps and four views; published: the exact"
            " gradient and one view. s/image: seconds of inverting, and of generating, of the run that"
            " completed the build; where an earlier run or arm had inverted, 0.",
            f"Iterations to acceptance: of {', '.join(few)}. The judge stops each seed, so its verdict is"
            f" no accuracy here. Mean over images; {size.limit} for what was not accepted by then.",
        ],
        classes=chosen, real=size.real, runner=runner, workers=workers,
        further=lambda built, seen, real: further(built, seen, size.limit),
    )  # fmt: skip


def further(built: Built | None, seen: Seen, limit: int) -> dict[str, Measure]:
    """Seconds an image, and for what the judge stopped the iterations that it took."""
    from jobs.evaluate.metrics import Measure
    from jobs.tangram.drawings import CLASSES

    if built is None:
        return {}
    n = len(seen.keys)
    found = {
        f"s_{phase}": Measure(built.phases.get(phase, 0.0) / built.manifest.samples, None, None, n)
        for phase in ("invert", "generate")
    }
    if built.arm.name.startswith(JUDGED):
        # between the loss of the seed as it came and that of the seed as it went, one before each step
        made = [min(len(row["refine_losses"]) - 3, limit) for row in seen.rows]
        accepted = seen.features.verdict_N == np.array([CLASSES.index(row["class"]) for row in seen.rows])
        found["accepted"] = study.mean(accepted, seen.groups)
        found["iterations"] = study.mean(np.where(accepted, made, limit), seen.groups)
    return found


def tables(classes: Sequence[str], few: Sequence[str], size: Size, guidance: float) -> list[Table]:
    from jobs.evaluate.harness import Table, View
    from jobs.tangram.drawings import HEAD, MIDDLE, RARE

    title = f"fixed_point, {size.steps} inversion steps; {size.steps} sampling steps; guidance {guidance:g}"
    names = [*STARTS, *(start + REFINED for start in STARTS), study.REAL]
    asked = [(name, PLAIN) for name in names if name not in (PLAIN, study.REAL)]
    asked += [(start + REFINED, start) for start in STARTS if start != PLAIN]
    published = PLAIN + PUBLISHED
    made = []
    for group, members in (("many", HEAD), ("medium", MIDDLE), ("few", RARE), ("all", classes)):
        labels = tuple(label for label in classes if label in members)
        if labels:
            also = [published] if set(labels) <= set(few) else []
            rows = {name: View(name, classes=labels) for name in [*names, *also]}
            forms = [(PLAIN + REFINED, published), (published, PLAIN)] if also else []
            made.append(Table(group, title, rows, (*asked, *forms), ("accuracy",)))
    rows = {start: View(JUDGED + start) for start in COUNTED}
    against = tuple((start, PLAIN) for start in COUNTED if start != PLAIN)
    compared = ("iterations", "accepted")
    counted = Table("iterations to acceptance", f"{', '.join(few)}; {title}", rows, against, compared)
    more = f"{size.decided} images a class"
    rows = {name: View(DECIDED + name) for name in (PLAIN, PLAIN + REFINED)}
    decided = Table(f"few, {more}", title, rows, ((PLAIN + REFINED, PLAIN),), ("accuracy", "frechet_judge"))
    return [*made, counted, decided]


def headings() -> dict[str, Any]:
    from jobs.evaluate.report import Heading

    return {
        "accuracy": Heading("judge accuracy", ".3f"),
        "frechet_judge": Heading("Fréchet, judge", ".2f", biased=True),
        "frechet_clip": Heading("Fréchet, CLIP", ".1f", biased=True),
        "diversity": Heading("diversity", ".3f"),
        "norm": Heading("norm/√d", ".3f"),
        "iterations": Heading("iterations", ".1f"),
        "accepted": Heading("accepted", ".3f"),
        "s_invert": Heading("inverting, s/image", ".2f"),
        "s_generate": Heading("generating, s/image", ".2f"),
    }


if __name__ == "__main__":
    from jobs.entry import run

    run(rare)
