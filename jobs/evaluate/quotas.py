"""From a confusion matrix to what the next build is asked for: weak classes and hard pairs as targets.

A class has a share of the images in proportion to its error: the mean probability that its references give to
other classes. A hard pair [source, class] is asked for as images of the class that is mistaken, made from
images of the class that it is taken for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from pipeline.config import BuildConfig


def targets(config: BuildConfig, rows: Iterable[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    """The `targets` of a config, `images` in all; half of them pairs if it has recipes for both.

    rows: of the matrix, with class, predicted and share. Raises `UserError` if nothing is confused.
    """
    from pipeline.config import method_of
    from schemas.errors import UserError

    rows = list(rows)
    labels = {row["class"] for row in rows}
    wrong = [row for row in rows if row["class"] != row["predicted"] and row["share"] > 0]
    error: dict[str, float] = {}
    for row in wrong:
        error[row["class"]] = error.get(row["class"], 0.0) + row["share"]
    pairs = {(r["predicted"], r["class"]): r["share"] for r in wrong if r["predicted"] in labels}
    hardest = dict(sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[: len(labels)])
    starts = {n: method_of("generate", recipe.generate).starts_from for n, recipe in config.recipes.items()}
    makers = [name for name, start in starts.items() if start != "source"]
    crossers = [name for name, start in starts.items() if start == "source"]
    if not error or (crossers and not hardest):
        raise UserError("the classifier confuses no classes of the references: nothing to ask for")
    crossing = images if not makers else images // 2 if crossers else 0
    found: list[dict[str, Any]] = []
    for label, count in apportion(error, images - crossing).items():
        found.append({"classes": [label], "accepted": count, "recipe": dict.fromkeys(makers, 1.0)})
    for pair, count in apportion(hardest, crossing).items():
        found.append({"pairs": [list(pair)], "accepted": count, "recipe": dict.fromkeys(crossers, 1.0)})
    return found


def apportion(weights: Mapping[Any, float], total: int) -> dict[Any, int]:
    """Whole numbers in proportion to weights, `total` in sum, by largest remainders; those of 0 left out."""
    whole = sum(weights.values())
    exact = {key: total * weight / whole for key, weight in weights.items()}
    counts = {key: int(value) for key, value in exact.items()}
    order: Sequence[Any] = sorted(exact, key=lambda key: (counts[key] - exact[key], key))
    for key in order[: total - sum(counts.values())]:
        counts[key] += 1
    return {key: count for key, count in counts.items() if count}


def as_yaml(found: Sequence[Mapping[str, Any]]) -> str:
    """As the `targets` of a config's YAML."""
    return yaml.safe_dump({"targets": [dict(target) for target in found]}, sort_keys=False)
