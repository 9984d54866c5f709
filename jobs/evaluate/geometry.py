"""`seedloom evaluate geometry`: every way to combine seeds, on drawings; Table 1 of the papers on tangram.

Samuel et al. (NAO), NeurIPS 2023, and Bodin et al. (COG), arXiv:2408.08558: interpolations at three inner
points of a pair, and centroids of 3, 5, 10 and 25 seeds in the numbers 10, 10, 4 and 1 a class. As in COG's
protocol seeds are inverted and images drawn at guidance 1, where the seed decides what is seen; at 4 the
prompt does, and a control row shows it.

References are 25 drawings of each class that nothing was trained on. Distances are taken to other drawings,
which are neither references nor anybody's training set.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobs.evaluate.harness import Arm, Built, Seen, Table, View
    from jobs.evaluate.metrics import Measure

POINTS = 3  # inner points of a pair, in both papers
PAIRS: dict[str, dict[str, Any] | None] = {
    "the seeds themselves": {"method": "lerp", "t": 0.0},  # t = 0 is the first seed of a pair
    "random noise": None,
    "lerp": {"method": "lerp", "points": POINTS},
    "slerp": {"method": "slerp", "points": POINTS},
    "slerp_rescaled": {"method": "slerp_rescaled", "points": POINTS},
    "geodesic": {"method": "geodesic", "points": POINTS},
    "cog": {"method": "cog", "points": POINTS},
    "nao": {"method": "nao", "points": POINTS},
    "lerp, equal angle": {"method": "lerp", "points": POINTS, "pace": "angle"},
    "cog, equal angle": {"method": "cog", "points": POINTS, "pace": "angle"},
}
GROUPS: dict[str, dict[str, Any]] = {
    "euclidean": {"method": "euclidean"},
    "normalized": {"method": "normalized"},
    "mode_norm": {"method": "mode_norm"},
    "standardized": {"method": "standardized"},
    "karcher": {"method": "karcher"},
    "geometric_median": {"method": "geometric_median"},
    "cog": {"method": "cog", "mode": "centroid"},
    "cog, whitened": {"method": "cog", "mode": "centroid", "whiten": True},
    "nao": {"method": "nao", "mode": "centroid"},
}
# The published optimiser takes seconds for what the others do in a millisecond, and 20 for 25 seeds: it is
# compared on a few classes, without the largest groups, in tables of its own.
ADAM = "nao_adam"
ADAM_GROUPS = 10
ADAM_PATH = 13  # points optimised, ends included: the paper's 12, and one more so that ¼, ½, ¾ are among them
REAL = "real drawings"
GUIDED = "slerp, guidance 4"
OTHER_STEPS = ("lerp", "slerp", "cog", "nao")  # are made with the other number of inversion steps as well
SD = (4, 64, 64)  # a latent of Stable Diffusion at 512 pixels, for times
TIMED_PATHS, TIMED_SECONDS = 20, 2.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is made."""

    references: int  # a class
    pairs: int  # a class, of POINTS images each
    groups: Mapping[int, int]  # seeds in a centroid → centroids of a class
    inversion_steps: int
    steps: int
    batch: int
    real: int  # drawings a class that distances refer to
    few: int  # classes with the other number of inversion steps, and with the published optimiser
    methods: tuple[str, ...] | None = None  # None: all


FULL = Size(
    references=25, pairs=10, groups={3: 10, 5: 10, 10: 4, 25: 1}, inversion_steps=50, steps=20, batch=5,
    real=100, few=6,
)  # fmt: skip
QUICK = Size(
    references=4, pairs=1, groups={3: 3}, inversion_steps=2, steps=1, batch=3, real=8, few=1,
    methods=("the seeds themselves", "random noise", "slerp", "cog"),
)  # fmt: skip


def geometry(
    out: Annotated[Path, typer.Option(help="Folder of builds and results.")] = Path("out/evaluate/geometry"),
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="A class of tangram. May be repeated; by default all.")
    ] = None,
    inversion: Annotated[str, typer.Option(help="The method that inverts.")] = "ddim",
    inversion_steps: Annotated[
        int, typer.Option(min=0, help="Another number of inversion steps, on a few classes; 0: none.")
    ] = 400,
    runner: Annotated[str, typer.Option(metavar="ray|local", help="Where the builds are made.")] = "ray",
    workers: Annotated[str, typer.Option(metavar="N|auto", help="How many workers.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Next to nothing of everything, for tests.")] = False,
) -> None:
    """Compare every combination of seeds: accuracy, distance to real drawings, diversity, norm and time.

    A second run builds nothing and measures again.
    """
    from jobs.evaluate.harness import Real, drawn_like, look, make, tabulate
    from jobs.evaluate.metrics import Observers
    from jobs.evaluate.report import picture, write
    from jobs.evaluate.sheets import contact_sheets
    from jobs.tangram.drawings import CLASSES, write_references
    from pipeline.store import Store
    from schemas.errors import UserError

    size = QUICK if quick else FULL
    chosen = tuple(dict.fromkeys(classes or (CLASSES[::10] if quick else CLASSES)))
    for label in chosen:
        if label not in CLASSES:
            raise UserError(f"--class {label!r}: tangram has no such class; allowed: {', '.join(CLASSES)}")
    few = chosen[:: max(1, len(chosen) // size.few)][: size.few]

    references, store = out / "references", str(out / "builds")
    if not (references / chosen[-1] / f"{size.references - 1:04d}.png").exists():
        write_references(references, chosen, size.references)
    begin = time.monotonic()
    run = {"runner": runner, "workers": int(workers) if workers.isdecimal() else workers}
    wanted = arms(size, references, chosen, inversion)
    wanted += adam_arms(size, references, few, inversion)
    if inversion_steps:
        wanted += other_steps(size, references, few, inversion, inversion_steps)
    built = make(wanted, store, run)
    building = time.monotonic() - begin

    begin = time.monotonic()
    observers = Observers()
    real = Real.seen_by(observers, chosen, size.real)
    seen = {name: look(Store(store), one, observers) for name, one in built.items()}
    seen[f"pairs: {REAL}"] = drawn_like(seen["pairs: random noise"], observers)
    seen[f"groups: {REAL}"] = drawn_like(
        next(s for n, s in seen.items() if n.startswith("groups")), observers
    )
    times = _Times(built)
    results = [
        tabulate(table, seen, real, built, times.of)
        for table in tables(size, tuple(seen), few, inversion, inversion_steps)
    ]
    sheets = contact_sheets(out, built["pairs: slerp"], observers, tuple(size.groups), size.steps)
    measuring = time.monotonic() - begin
    notes = [
        *_remarks(size, chosen),
        _correlation(built["pairs: slerp"].manifest),
        f"building: {building:.0f} s now, {sum(b.seconds for b in built.values()):.0f} s in the runs that"
        f" completed the builds; measuring: {measuring:.0f} s",
    ]
    page = picture([result for result in results if not result.name.startswith("centroid of")], headings())
    files = write(out, "geometry", results, headings(), notes, page)
    print("\n".join(str(file) for file in [*files, *sheets]))


# --- what is made -------------------------------------------------------------------------------------------


def arms(size: Size, references: Path, classes: Sequence[str], inversion: str) -> list[Arm]:
    """Every arm at the ordinary number of inversion steps."""
    from jobs.evaluate.harness import Arm

    def arm(name: str, recipes: Mapping[str, Any], counts: Mapping[str, int]) -> Arm:
        return Arm(name, _config(name, references, classes, recipes, counts))

    made = []
    for name, combine in PAIRS.items():
        if size.methods is None or name in size.methods:
            recipe = _recipe(size, inversion, size.inversion_steps, combine)
            made.append(arm(f"pairs: {name}", {"pair": recipe}, {"pair": POINTS * size.pairs}))
    guided = _recipe(size, inversion, size.inversion_steps, PAIRS["slerp"], guidance=4.0)
    made.append(arm(f"pairs: {GUIDED}", {"pair": guided}, {"pair": POINTS * size.pairs}))
    for name, combine in GROUPS.items():
        if size.methods is None or name in size.methods:
            recipes = {
                f"group_{k}": _recipe(size, inversion, size.inversion_steps, {**combine, "group": k})
                for k in size.groups
            }
            made.append(arm(f"groups: {name}", recipes, {f"group_{k}": n for k, n in size.groups.items()}))
    return made


def adam_arms(size: Size, references: Path, classes: Sequence[str], inversion: str) -> list[Arm]:
    """The published optimiser: paths, and centroids of groups that are not too large."""
    from jobs.evaluate.harness import Arm

    if size.methods is not None and ADAM not in size.methods:
        return []
    adam: dict[str, Any] = {"method": ADAM, "path": ADAM_PATH}
    path = _recipe(size, inversion, size.inversion_steps, {**adam, "points": POINTS})
    sizes = {k: n for k, n in size.groups.items() if k <= ADAM_GROUPS}
    groups = {
        f"group_{k}": _recipe(size, inversion, size.inversion_steps, {**adam, "mode": "centroid", "group": k})
        for k in sizes
    }
    made = []
    for name, recipes, counts in (
        (f"few pairs: {ADAM}", {"pair": path}, {"pair": POINTS * size.pairs}),
        (f"few groups: {ADAM}", groups, {f"group_{k}": n for k, n in sizes.items()}),
    ):
        made.append(Arm(name, _config(name, references, classes, recipes, counts)))
    return made


def other_steps(
    size: Size, references: Path, classes: Sequence[str], inversion: str, steps: int
) -> list[Arm]:
    """A few methods at another number of inversion steps."""
    from jobs.evaluate.harness import Arm

    made = []
    for name in OTHER_STEPS:
        if size.methods is None or name in size.methods:
            recipes = {"pair": _recipe(size, inversion, steps, PAIRS[name])}
            title = f"pairs at {steps} steps: {name}"
            counts = {"pair": POINTS * size.pairs}
            made.append(Arm(title, _config(title, references, classes, recipes, counts)))
    return made


def _recipe(
    size: Size, inversion: str, inversion_steps: int, combine: Mapping[str, Any] | None, guidance: float = 1.0
) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "generate": {"method": "text_to_image", "steps": size.steps, "guidance": guidance},
        # seeds are shared by arms of one device batch, and the numbers of FULL are multiples of it
        "unit": size.batch,
        "batch": size.batch,
    }
    if combine is not None:
        invert = {"method": inversion, "steps": inversion_steps, "guidance": 1.0}
        recipe |= {"invert": invert, "combine": dict(combine)}
    return recipe


def _config(
    name: str, references: Path, classes: Sequence[str], recipes: Mapping[str, Any], counts: Mapping[str, int]
) -> dict[str, Any]:
    """The build config of an arm: no filter, one attempt, so that its images are what the method makes."""
    return {
        "name": name,
        "references": {"uri": str(references)},
        "recipes": dict(recipes),
        "targets": [
            {
                "classes": list(classes),
                "accepted": sum(counts.values()),
                "attempts": 1,
                "recipe": dict(counts),
            }
        ],
        "shard": {"image": "png"},
    }


# --- what is compared ---------------------------------------------------------------------------------------


def tables(
    size: Size, seen: Sequence[str], few: Sequence[str], inversion: str, inversion_steps: int
) -> list[Table]:
    """Interpolations, centroids over all sizes of groups and by size, and what is made of a few classes."""
    from jobs.evaluate.harness import Table, View

    def conditions(steps: Any) -> str:
        return f"{inversion}, {steps} inversion steps; {size.steps} sampling steps; guidance 1"

    paths = f"{POINTS} inner points of {size.pairs} pairs a class"

    def rows(kind: str, **view: Any) -> dict[str, View]:
        return {n.removeprefix(f"{kind}: "): View(n, **view) for n in seen if n.startswith(f"{kind}: ")}

    def asked(names: Mapping[str, View], against: str) -> tuple[tuple[str, str], ...]:
        return tuple((n, against) for n in names if n not in (against, REAL))

    pairs, groups = rows("pairs"), rows("groups")
    against = "normalized" if "normalized" in groups else next(iter(groups))
    made = [
        Table(
            "interpolation",
            f"{paths}; {conditions(size.inversion_steps)}",
            pairs,
            asked(pairs, "slerp") + ((("cog", "cog, equal angle"),) if "cog, equal angle" in pairs else ()),
        ),
        Table(
            "centroid",
            "groups of " + ", ".join(map(str, size.groups)) + f"; {conditions(size.inversion_steps)}",
            groups,
            asked(groups, against),
        ),
    ]
    for k in size.groups if len(size.groups) > 1 else ():
        title = f"groups of {k}; {conditions(size.inversion_steps)}"
        made.append(Table(f"centroid of {k}", title, rows("groups", recipes=(f"group_{k}",))))
    some, shown = tuple(few), ", ".join(few)
    sizes = [k for k in size.groups if k <= ADAM_GROUPS]
    recipes = tuple(f"group_{k}" for k in sizes)
    for kind, title, view, others in (
        ("pairs", paths, {}, ("slerp", "slerp_rescaled", "nao")),
        ("groups", f"groups of {', '.join(map(str, sizes))}", {"recipes": recipes}, (against, "nao")),
    ):
        if adam := rows(f"few {kind}"):
            rivals = {n: View(f"{kind}: {n}", classes=some, **view) for n in others}
            asked_of = tuple((ADAM, name) for name in rivals)
            title = f"{shown}; {title}; {conditions(size.inversion_steps)}"
            made.append(Table(f"published optimiser, {kind}", title, adam | rivals, asked_of))
    if more := rows(f"pairs at {inversion_steps} steps"):
        fewer = {f"{n}, {size.inversion_steps} steps": View(f"pairs: {n}", classes=some) for n in more}
        compared = {f"{n}, {inversion_steps} steps": view for n, view in more.items()}
        title = f"{shown}; {paths}; {conditions(f'{size.inversion_steps} or {inversion_steps}')}"
        made.append(
            Table("inversion steps", title, fewer | compared, tuple(zip(compared, fewer, strict=True)))
        )
    return made


def headings() -> dict[str, Any]:
    from jobs.evaluate.report import Heading

    return {
        "accuracy": Heading("judge accuracy", ".3f"),
        "frechet_judge": Heading("Fréchet, judge", ".2f", biased=True),
        "frechet_clip": Heading("Fréchet, CLIP", ".1f", biased=True),
        "diversity": Heading("diversity", ".3f"),
        "norm": Heading("norm/√d", ".3f"),
        "ms": Heading("ms", ".2f", logarithmic=True),
        "ms_sd": Heading("ms at 4×64×64", ".2f", logarithmic=True),
    }


class _Times:
    """Milliseconds of a path, or of a group of the first size that a row shows; measured once."""

    def __init__(self, built: Mapping[str, Built]):
        self._built = built
        self._known: dict[tuple[str, str], dict[str, Measure]] = {}

    def of(self, view: View, seen: Seen) -> dict[str, Measure]:
        if view.arm not in self._built:
            return {}
        recipes = self._built[view.arm].plan.config.recipes
        recipe = view.recipes[0] if view.recipes else next(iter(recipes))
        if recipes[recipe].combine is None:
            return {}
        key = (view.arm, recipe)
        if key not in self._known:
            self._known[key] = self._measure(*key)
        return self._known[key]

    def _measure(self, arm: str, recipe: str) -> dict[str, Measure]:
        from jobs.evaluate.harness import milliseconds

        built = self._built[arm]
        times = {"ms": milliseconds(built, recipe, None, TIMED_PATHS, TIMED_SECONDS)}
        if not arm.endswith(ADAM):  # minutes; `seedloom benchmark nao` has them
            times["ms_sd"] = milliseconds(built, recipe, SD, TIMED_PATHS, TIMED_SECONDS)
        return times


def _remarks(size: Size, classes: Sequence[str]) -> list[str]:
    """What must be known to read the tables."""
    return [
        f"{len(classes)} classes, {size.references} references each, drawn by tangram's own program and held"
        f" out of all training; distances are to {size.real} other drawings of each class. Judge and CLIP"
        " learned from balanced drawings, so they know the rare classes well.",
        f"n counts images; the {POINTS} of a pair are no independent ones, which the intervals of differences"
        f" take into account and Wilson's do not. The real drawings show the distance that perfect images of"
        " the same number would have.",
        f"ms: median of the combine calls of one path of {POINTS} points, or of one group of"
        f" {next(iter(size.groups))}; on one thread.",
    ]


def _correlation(manifest: Any) -> str:
    """How far the seeds of a class are from independent: what COG and centroids take them for."""
    found = {label: target.recipes["pair"].seeds.correlation for label, target in manifest.targets.items()}
    mean, (low, high) = sum(found.values()) / len(found), (min(found.values()), max(found.values()))
    return (
        f"mean cosine of two seeds of a class: {mean:.3f} (classes: {low:.3f} to {high:.3f}); independent: 0"
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(geometry)
