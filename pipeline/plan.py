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

from pipeline.config import BuildConfig, Recipe, method_of
from pipeline.goals import Goal, goals
from pipeline.references import Lock, set_name
from pipeline.select import stream_quotas
from schemas.errors import UserError
from schemas.ids import fingerprint, slug
from schemas.records import Reference
from schemas.settings import Settings
from schemas.tables import VERSION, score_name
from stages.backbones.diffusion.folder import backbone_fingerprint
from stages.backbones.diffusion.load import BackboneFacts, native_size
from stages.backbones.models import LoadedModels
from stages.contract import Facts, Models, Pairwise, Question


@dataclass(frozen=True)
class FilterPlan:
    """A filter or a measure."""

    kind: str
    settings: Settings
    id: str  # fingerprint of what its scores depend on; thresholds are not among it
    compared: tuple[Reference, ...] = ()  # images that candidates are compared with
    artifact: str | None = None  # fingerprint of what it makes once of these

    @cached_property
    def method(self) -> Any:
        method = method_of(self.kind, self.settings)
        method.compared = self.compared
        return method

    def __reduce__(self) -> Any:
        # without the method: a worker must look it up itself, for only that gives a user's class its name
        return FilterPlan, (self.kind, self.settings, self.id, self.compared, self.artifact)


@dataclass(frozen=True)
class StreamPlan:
    """The candidates of one (target, recipe)."""

    id: str  # fingerprint of all that the bytes of its parts depend on
    target: str  # the class as its folder is called, or "source -> class"
    label: str  # the class as its folder is called
    class_index: int
    recipe: str
    prompt: str
    question: Question
    references: tuple[Reference, ...]  # of its class, where it inverts them or learns from them
    sources: tuple[Reference, ...]  # images that candidates start from
    quota: int
    max_units: int
    unit: int
    batch: int
    seeds: str | None  # fingerprint of its reference seeds
    artifacts: Mapping[str, str]  # kind of stage → fingerprint of what it made once for the class
    filters: tuple[FilterPlan, ...]  # and measures
    share: float = 1  # of the target's accepted images, as a weight

    @property
    def pairwise(self) -> FilterPlan | None:
        """The filter that compares its candidates with each other."""
        return next((f for f in self.filters if isinstance(f.method, Pairwise)), None)

    @property
    def name(self) -> str:
        return f"{self.target} / {self.recipe}"

    def key(self, index: int) -> str:
        """The key of a candidate: readable, unique, without dots."""
        # with the longest extension it must fit the 100 bytes of a tar's name field
        return f"{slug(self.target, 40)}-{slug(self.recipe, 32)}-{index:06d}-{self.id[:8]}"


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
        """References that some stream inverts, learns from or starts from, or is compared with."""
        compared = [r for s in self.streams for f in s.filters if not held_out(f) for r in f.compared]
        return [r for s in self.streams for r in (*s.references, *s.sources)] + compared


def held_out(chosen: FilterPlan) -> bool:
    """Whether a filter compares with held-out images, which are no references."""
    return chosen.method.compares == "held_out"


def make_plan(config: BuildConfig, lock: Lock) -> Plan:
    """Resolve targets, check that they can be met in principle, and name everything. Raises `UserError`."""
    asked = goals(config, lock)
    classes = tuple(sorted({*lock.classes, *(goal.label for goal in asked)}))
    readable = {label: config.readable(label) for label in classes}
    named = {readable[label]: label for label in classes}
    if twins := [label for label in classes if named[readable[label]] != label]:
        name = readable[twins[0]]
        raise UserError(
            f"targets: the classes {twins[0]!r} and {named[name]!r} both read {name!r}; rename one"
        )
    prompts = {label: config.prompt.replace("{class}", readable[label]) for label in classes}
    known = _Known(config, lock, LoadedModels(), BackboneFacts(config.backbone))

    streams = []
    for goal in asked:
        question = Question(
            target=readable[goal.label],
            prompt=prompts[goal.label],
            others={readable[other]: prompts[other] for other in classes if other != goal.label},
        )
        quotas = stream_quotas(config.shares(goal.target), goal.target.accepted)
        streams += [
            known.stream(goal, name, quota, question, classes.index(goal.label))
            for name, quota in quotas.items()
        ]
    made_by = {s.id: [f.id for f in s.filters] for s in streams}  # versions of methods are in these alone
    build_id = fingerprint(
        {
            "config": config.described(),
            "references": lock.fingerprint,
            "models": known.used,
            "streams": made_by,
        }
    )
    return Plan(build_id, config, lock, tuple(streams), classes, dict(sorted(known.used.items())))


def _batch(recipe: Recipe) -> int:
    """The device batch; as long as it is to be chosen, one."""
    return 1 if recipe.batch == "auto" else recipe.batch


class _Known:
    """What a plan knows of config, references and models, and the fingerprints that it takes of them."""

    def __init__(self, config: BuildConfig, lock: Lock, models: Models, facts: Facts):
        self.config, self.lock, self.models, self.facts = config, lock, models, facts
        self.backbone = backbone_fingerprint(config.backbone)
        self.used = {"backbone": self.backbone}  # models of the build → fingerprint

    def stream(self, goal: Goal, name: str, quota: int, question: Question, class_index: int) -> StreamPlan:
        """The candidates of one goal by one recipe. Raises `UserError` when they cannot be made."""
        recipe = self.config.recipes[name]
        generate = method_of("generate", recipe.generate)
        own = self.lock.classes.get(goal.label, ())
        self._enough(goal.label, name, recipe, len(own))
        self._possible(name, recipe)
        generate.check(self.facts, self.models, question.target, question.prompt)
        if recipe.refine is not None:
            method_of("refine", recipe.refine).check(generate.sampler(), self.models, question.target)
        sources: tuple[Reference, ...] = ()
        if generate.starts_from == "reference":
            sources = own
        elif generate.starts_from == "source":
            sources = tuple(r for label in goal.sources for r in self.lock.classes[label])
        ids = self._ids(recipe, goal.name, name, question.prompt, own, sources)
        filters = tuple(
            self._filter(kind, settings, question, (*own, *sources))
            for kind, chosen in (
                ("filter", self.config.filters(goal.target, name)),
                ("measure", self.config.measure),
            )
            for settings in chosen
        )
        for f in filters:
            f.method.check(self.models, question)
        return StreamPlan(
            target=goal.name,
            label=goal.label,
            class_index=class_index,
            recipe=name,
            prompt=question.prompt,
            question=question,
            references=own if ids["seeds"] or ids["artifacts"] else (),
            sources=sources,
            quota=quota,
            max_units=math.ceil(quota * goal.target.attempts / recipe.unit),
            unit=recipe.unit,
            batch=_batch(recipe),
            filters=filters,
            share=self.config.shares(goal.target)[name],
            **ids,
        )

    def _possible(self, name: str, recipe: Recipe) -> None:
        """Raise when the backbone cannot do what the methods of a recipe need."""
        architecture, sampler = self.facts.architecture, method_of("generate", recipe.generate).sampler()
        for kind in ("invert", "combine", "refine", "generate"):
            settings = getattr(recipe, kind)
            if settings is None:
                continue
            method = method_of(kind, settings)
            if reason := architecture.refuses(method.needs):
                raise UserError(f"recipes.{name}.{kind}: {method.name} needs {reason}")
            guidance = getattr(settings, "guidance", 1.0)
            if guidance != 1 and not architecture.prompted:
                raise UserError(
                    f"recipes.{name}.{kind}.guidance: {guidance:g} given, and backbone"
                    f" {self.config.backbone.model} reads no prompts to be guided by; set it to 1"
                )
        if sampler.scheduler is not None and sampler.scheduler not in architecture.schedulers:
            raise UserError(
                f"recipes.{name}.generate.scheduler: {sampler.scheduler} given; a backbone of kind"
                f" {architecture.name} has {', '.join(architecture.schedulers)}"
            )
        if sampler.steps > self.facts.timesteps:
            raise UserError(
                f"recipes.{name}.generate.steps: {sampler.steps} given, the backbone has"
                f" {self.facts.timesteps} timesteps"
            )

    def _enough(self, label: str, name: str, recipe: Recipe, count: int) -> None:
        """Raise when a class has fewer references than the methods of a recipe need."""
        needed, method = 0, ""
        if recipe.combine is not None:
            combine = method_of("combine", recipe.combine)
            needed, method = combine.seeds_needed(), combine.name
        generate = method_of("generate", recipe.generate)
        learning = [method_of("refine", recipe.refine)] if recipe.refine is not None else []
        for one in [*learning, generate]:
            if needed < 1 and (
                one.prepared() is not None or (one is generate and one.starts_from == "reference")
            ):
                needed, method = 1, one.name
        if count < needed:
            refused = self.config.references is not None and count == 0
            raise UserError(
                f"class {label!r} has {count} usable references, but {method} in recipe {name!r} needs"
                f" {needed};"
                + (" none of its files could be used;" if refused else "")
                + " add images, or leave the class out of the targets"
            )

    def _ids(
        self,
        recipe: Recipe,
        target: str,
        name: str,
        prompt: str,
        references: tuple[Reference, ...],
        sources: tuple[Reference, ...],
    ) -> dict[str, Any]:
        """Fingerprints of seeds, artifacts and parts: each covers all that its bytes depend on."""
        hashes = [r.sha256 for r in references]
        # what a class has once is made from its references one by one, whatever the batch
        once = {"format": VERSION, "backbone": self.backbone, "prompt": prompt}
        common = {**once, "batch": _batch(recipe)}
        seeds = None
        if recipe.combine is not None:
            assert recipe.invert is not None  # Recipe fills it in
            # per image: the set of references is not part of it, so a new image leaves other seeds alone
            seeds = fingerprint({**common, "invert": method_of("invert", recipe.invert).identity()})
        stages, artifacts = {}, {}
        for kind in ("combine", "refine", "generate"):
            if (settings := getattr(recipe, kind)) is None:
                continue
            method = method_of(kind, settings)
            models = {} if kind == "combine" else self._model_ids(method)
            stages[kind] = {**method.identity(), "models": models}
            if (made := method.prepared()) is not None:
                made_from = {**once, "references": hashes, "models": models, "made": dict(made)}
                if kind == "combine":
                    made_from |= {**common, "seeds": seeds}
                artifacts[kind] = fingerprint(made_from)
        parts = fingerprint(
            {
                **common,
                "rng_seed": self.config.rng_seed,
                "target": target,
                "recipe": name,
                "stages": stages,
                "seeds": seeds,
                "artifacts": artifacts,
                "references": hashes if seeds or artifacts else [],
                "sources": [r.sha256 for r in sources],
                "unit": recipe.unit,
                "image": [self.config.shard.image, self.config.shard.quality],
            }
        )
        return {"id": parts, "seeds": seeds, "artifacts": artifacts}

    def _model_ids(self, method: Any) -> dict[str, str]:
        ids = {
            f"{kind} {name}": self.models.fingerprint(kind, name) for kind, name in method.models().items()
        }
        self.used |= ids
        return ids

    def _filter(
        self, kind: str, settings: Settings, question: Question, references: tuple[Reference, ...]
    ) -> FilterPlan:
        method = method_of(kind, settings)
        made_by = {
            "format": VERSION,
            "method": method.name,
            "version": method.version,
            "scored": dict(method.scored()),
            "models": self._model_ids(method),
        }
        compared: tuple[Reference, ...] = ()
        if method.compares == "references":
            compared = tuple({r.sha256: r for r in references}.values())
        elif method.compares == "held_out":
            compared = self.lock.held_out[set_name(settings.held_out)].admitted()  # type: ignore[attr-defined]
        asked = {
            **made_by,
            "backbone": self.backbone if method.uses_backbone else None,
            "target": question.target,
            "prompt": question.prompt,
            "others": dict(question.others),
        }
        if method.compares == "held_out":
            asked["held_out"] = [r.sha256 for r in compared]
        artifact = None
        if compared:
            size = native_size(self.config.backbone)
            artifact = fingerprint({**made_by, "compared": [r.sha256 for r in compared], "size": size})
        return FilterPlan(kind, settings, fingerprint(asked), compared, artifact)
