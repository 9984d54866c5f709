"""The plan: what a config and a lock of references ask for, as streams of numbered candidates.

Nothing is measured and no model is loaded. Everything that names stored results is a fingerprint taken here,
so this file decides what is shared between builds and what is made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.config import BuildConfig, FewerThan, Recipe, Target, method_of
from pipeline.references import Lock
from pipeline.select import stream_quotas
from schemas.errors import UserError
from schemas.ids import fingerprint, slug
from schemas.records import Reference
from schemas.settings import Settings
from schemas.tables import VERSION, score_name
from stages.backbones.latent_diffusion import backbone_fingerprint
from stages.backbones.models import LoadedModels
from stages.contract import Method, Models, Question, has_artifact


@dataclass(frozen=True)
class FilterPlan:
    settings: Settings
    id: str  # fingerprint of what its scores depend on; thresholds are not among it

    @cached_property
    def method(self) -> Any:
        return method_of("filter", self.settings)

    def __reduce__(self) -> Any:
        # without the method: a worker must look it up itself, for only that gives a user's class its name
        return FilterPlan, (self.settings, self.id)


@dataclass(frozen=True)
class StreamPlan:
    """The candidates of one (target, recipe)."""

    id: str  # fingerprint of all that the bytes of its parts depend on
    label: str  # the class as its folder is called
    class_index: int
    recipe: str
    prompt: str
    question: Question
    references: tuple[Reference, ...]
    quota: int
    max_units: int
    unit: int
    batch: int
    seeds: str | None  # fingerprint of its reference seeds
    artifact: str | None  # fingerprint of its class artifact
    filters: tuple[FilterPlan, ...]

    @property
    def name(self) -> str:
        return f"{self.label} / {self.recipe}"

    def key(self, index: int) -> str:
        """The key of a candidate: readable, unique, without dots."""
        # with the longest extension it must fit the 100 bytes of a tar's name field
        return f"{slug(self.label, 40)}-{slug(self.recipe, 32)}-{index:06d}-{self.id[:8]}"


@dataclass(frozen=True)
class Plan:
    build_id: str
    config: BuildConfig
    lock: Lock
    streams: tuple[StreamPlan, ...]
    classes: tuple[str, ...]  # labels in the order of their class index
    models: Mapping[str, str]  # "backbone", "clip tangram", … → fingerprint

    @cached_property
    def by_id(self) -> dict[str, StreamPlan]:
        return {stream.id: stream for stream in self.streams}

    @cached_property
    def score_names(self) -> tuple[str, ...]:
        """The score columns of the samples, over all filters of the build."""
        return tuple(
            sorted(
                {
                    score_name(f.method.name, column)
                    for stream in self.streams
                    for f in stream.filters
                    for column in f.method.columns()
                }
            )
        )

    @property
    def build_folder(self) -> str:
        return f"builds/{self.build_id}"

    def used_references(self) -> list[Reference]:
        """References that some stream inverts or learns from."""
        return [r for s in self.streams if s.seeds or s.artifact for r in s.references]


def make_plan(config: BuildConfig, lock: Lock) -> Plan:
    """Resolve targets, check that they can be met in principle, and name everything. Raises `UserError`."""
    models = LoadedModels()
    backbone = backbone_fingerprint(config.backbone)
    used = {"backbone": backbone}
    chosen = _targets(config, lock)
    classes = tuple(sorted({*lock.classes, *chosen}))
    readable = {label: config.readable(label) for label in classes}
    named = {readable[label]: label for label in classes}
    if twins := [label for label in classes if named[readable[label]] != label]:
        name = readable[twins[0]]
        raise UserError(
            f"targets: the classes {twins[0]!r} and {named[name]!r} both read {name!r}; rename one"
        )
    prompts = {label: config.prompt.replace("{class}", readable[label]) for label in classes}

    streams = []
    for label, target in chosen.items():
        shares = config.shares(target)
        quotas = stream_quotas(shares, target.accepted)
        question = Question(
            target=readable[label],
            prompt=prompts[label],
            others={readable[other]: prompts[other] for other in classes if other != label},
        )
        for recipe_name, quota in quotas.items():
            recipe = config.recipes[recipe_name]
            references = lock.classes.get(label, ())
            _check_references(config, label, recipe_name, recipe, len(references))
            ids = _stream_ids(
                config, backbone, models, recipe, label, recipe_name, prompts[label], references
            )
            filters = tuple(
                FilterPlan(settings, _filter_id(settings, models, question, used))
                for settings in config.filters(target, recipe_name)
            )
            for f in filters:
                f.method.check(models, question)
            if recipe.refine is not None:
                method_of("refine", recipe.refine).check(method_of("generate", recipe.generate).sampler())
            used |= _model_ids(method_of("refine", recipe.refine), models) if recipe.refine else {}
            streams.append(
                StreamPlan(
                    label=label,
                    class_index=classes.index(label),
                    recipe=recipe_name,
                    prompt=prompts[label],
                    question=question,
                    references=references if ids["seeds"] or ids["artifact"] else (),
                    quota=quota,
                    max_units=math.ceil(quota * target.attempts / recipe.unit),
                    unit=recipe.unit,
                    batch=recipe.batch,
                    filters=filters,
                    **ids,
                )
            )
    made_by = {s.id: [f.id for f in s.filters] for s in streams}  # versions of methods are in these alone
    build_id = fingerprint(
        {
            "config": config.described(),
            "references": lock.fingerprint,
            "models": used,
            "streams": made_by,
        }
    )
    return Plan(build_id, config, lock, tuple(streams), classes, dict(sorted(used.items())))


def _targets(config: BuildConfig, lock: Lock) -> dict[str, Target]:
    """Label → its target, in label order."""
    chosen: dict[str, Target] = {}
    for i, target in enumerate(config.targets):
        for label in _labels(config, lock, target, f"targets.{i}.classes"):
            if label in chosen:
                raise UserError(
                    f"targets.{i}.classes: {label!r} is asked for by two targets; name each class once"
                )
            chosen[label] = target
    return dict(sorted(chosen.items()))


def _labels(config: BuildConfig, lock: Lock, target: Target, where: str) -> list[str]:
    if isinstance(target.classes, tuple):
        # without references there is nothing to compare the names with: prompts alone define the classes
        if config.references is not None:
            seen = lock.account()
            for label in target.classes:
                if label not in seen:
                    known = ", ".join(list(seen)[:30])
                    raise UserError(f"{where}: no references of class {label!r}; classes there: {known}")
        return list(target.classes)
    if not lock.account():
        raise UserError(f"{where}: needs `references` to know the classes; set them or list the classes")
    if isinstance(target.classes, FewerThan):
        limit = target.classes.fewer_than
        labels = [label for label in lock.account() if len(lock.classes.get(label, ())) < limit]
        if not labels:
            raise UserError(f"{where}: no class has fewer than {limit} references")
        return labels
    return list(lock.account())


def _check_references(config: BuildConfig, label: str, name: str, recipe: Recipe, count: int) -> None:
    needed, method = 0, ""
    if recipe.combine is not None:
        needed, method = method_of("combine", recipe.combine).seeds_needed(), recipe.combine.method  # type: ignore[attr-defined]
    if recipe.refine is not None and has_artifact(method_of("refine", recipe.refine)) and needed < 1:
        needed, method = 1, recipe.refine.method  # type: ignore[attr-defined]
    if count < needed:
        refused = config.references is not None and count == 0
        raise UserError(
            f"class {label!r} has {count} usable references, but {method} in recipe {name!r} needs {needed};"
            + (" none of its files could be used;" if refused else "")
            + " add images, or leave the class out of the targets"
        )


def _identity(settings: Settings, kind: str) -> dict[str, Any]:
    method: Method = method_of(kind, settings)
    return {"settings": settings.model_dump(mode="json"), "version": method.version}


def _model_ids(method: Any, models: Models) -> dict[str, str]:
    return {f"{kind} {name}": models.fingerprint(kind, name) for kind, name in method.models().items()}


def _stream_ids(
    config: BuildConfig,
    backbone: str,
    models: Models,
    recipe: Recipe,
    label: str,
    recipe_name: str,
    prompt: str,
    references: tuple[Reference, ...],
) -> dict[str, Any]:
    """Fingerprints of a stream's seeds, artifact and parts: each covers all that its bytes depend on."""
    hashes = [r.sha256 for r in references]
    common = {"format": VERSION, "backbone": backbone, "prompt": prompt, "batch": recipe.batch}
    seeds = artifact = None
    stages = {"generate": _identity(recipe.generate, "generate")}
    if recipe.combine is not None:
        assert recipe.invert is not None  # Recipe fills it in
        # per image: the set of references is not part of it, so a new image leaves the others' seeds alone
        seeds = fingerprint({**common, "invert": _identity(recipe.invert, "invert")})
        stages["combine"] = _identity(recipe.combine, "combine")
    if recipe.refine is not None:
        stages["refine"] = {
            **_identity(recipe.refine, "refine"),
            "models": _model_ids(method_of("refine", recipe.refine), models),
        }
    makers = {
        kind: stages[kind]
        for kind, settings in (("combine", recipe.combine), ("refine", recipe.refine))
        if settings is not None and has_artifact(method_of(kind, settings))
    }
    if makers:
        made_from = {"references": hashes, "seeds": seeds if "combine" in makers else None}
        artifact = fingerprint({**common, **made_from, "stages": makers})
    parts = fingerprint(
        {
            **common,
            "rng_seed": config.rng_seed,
            "target": label,
            "recipe": recipe_name,
            "stages": stages,
            "seeds": seeds,
            "artifact": artifact,
            "references": hashes if seeds or artifact else [],
            "unit": recipe.unit,
            "image": [config.shard.image, config.shard.quality],
        }
    )
    return {"id": parts, "seeds": seeds, "artifact": artifact}


def _filter_id(settings: Settings, models: Models, question: Question, used: dict[str, str]) -> str:
    method = method_of("filter", settings)
    ids = _model_ids(method, models)
    used |= ids
    return fingerprint(
        {
            "format": VERSION,
            "method": method.name,
            "version": method.version,
            "scored": dict(method.scored()),
            "models": ids,
            "target": question.target,
            "prompt": question.prompt,
            "others": dict(question.others),
        }
    )
