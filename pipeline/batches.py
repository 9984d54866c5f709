"""`batch: auto`: the largest device batch that runs, tried once for each recipe and kept.

    artifacts/<fingerprint>/batch.json

Float kernels give other bits at other batch shapes, so the answer is an input of everything that is made
after it: it is committed before the first unit, and every later build in this store reads it, whatever
devices it has. A plan without an answer is provisional: its batch is 1, and its streams have other names than
those that will be made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pipeline.config import BuildConfig, Recipe, method_of
from pipeline.plan import Plan, StreamPlan
from pipeline.store import Store
from schemas.ids import fingerprint
from schemas.sealed import seal, unseal
from schemas.tables import VERSION
from stages.backbones.diffusion.folder import backbone_fingerprint

# Beyond this a batch gains nothing that is worth its memory; a core is busy with less.
LARGEST = {"cuda": 64, "cpu": 8}


def _name(config: BuildConfig, recipe: Recipe) -> str:
    stages = {
        kind: method_of(kind, settings).identity()
        for kind in ("invert", "combine", "refine", "generate")
        if (settings := getattr(recipe, kind)) is not None
    }
    asked = {
        "format": VERSION,
        "backbone": backbone_fingerprint(config.backbone),
        "stages": stages,
        "unit": recipe.unit,
    }
    return f"artifacts/{fingerprint(['batch', asked])}/batch.json"


def decided(config: BuildConfig, store: Store) -> BuildConfig:
    """The config with the batches that the store has for `auto`; what it has none for stays as it is."""
    recipes = {}
    for name, recipe in config.recipes.items():
        if recipe.batch == "auto":
            answer = _name(config, recipe)
            try:
                kept = unseal(store.get(answer), f"{store.uri}/{answer}")
                recipe = recipe.model_copy(update={"batch": kept["batch"]})
            except FileNotFoundError:
                pass
        recipes[name] = recipe
    return config.model_copy(update={"recipes": recipes})


def undecided(plan: Plan) -> dict[str, StreamPlan]:
    """Recipes that wait for an answer → a stream of each."""
    return {s.recipe: s for s in reversed(plan.streams) if plan.config.recipes[s.recipe].batch == "auto"}


def sizes(unit: int, device: str) -> Iterator[int]:
    """The batches that a unit can be made in on this kind of device, from the largest."""
    return (size for size in range(min(unit, LARGEST[device]), 0, -1) if unit % size == 0)


def largest(candidates: Iterator[int], runs: Callable[[int], bool]) -> int | None:
    """The first of these batches that runs; None when none does."""
    return next((size for size in candidates if runs(size)), None)


def keep_batch(store: Store, plan: Plan, stream: StreamPlan, batch: int, environment: dict[str, Any]) -> None:
    """Commit the answer for the recipe of a stream, unless another has."""
    name = _name(plan.config, plan.config.recipes[stream.recipe])
    store.put_new(name, seal({"batch": batch, "recipe": stream.recipe, "environment": environment}))
