"""The configuration of a build: one YAML file is one dataset.

`BuildConfig` is what the file says; `load` reads it, applies `--set`, and turns every mistake into one line.
The settings of a method live beside the method; here they are looked up by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry
from stages.backbones.diffusion.settings import BackboneSettings
from stages.choice import MethodSettings, shortened
from stages.read.settings import ReadSettings


def _or_else(allowed: str) -> WrapValidator:
    """In place of the complaints of each member of a union, one that says what is allowed."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            known = {"allowed": allowed, "given": shortened(value)}
            raise PydanticCustomError("said", "must be {allowed}, given {given}", known) from error

    return WrapValidator(check)


def method_of(kind: str, settings: Settings) -> Any:
    """The method instance that a settings object asks for."""
    tag = "kind" if kind == "read" else "method"
    return registry.resolve(kind, getattr(settings, tag))(settings)


References = Annotated[
    SerializeAsAny[ReadSettings], MethodSettings("read", tag="kind", default="imagefolder")
]
InvertSettings = Annotated[SerializeAsAny[Settings], MethodSettings("invert")]
CombineSettings = Annotated[SerializeAsAny[Settings], MethodSettings("combine")]
RefineSettings = Annotated[SerializeAsAny[Settings], MethodSettings("refine")]
GenerateSettings = Annotated[SerializeAsAny[Settings], MethodSettings("generate")]
FilterSettings = Annotated[SerializeAsAny[Settings], MethodSettings("filter")]
MeasureSettings = Annotated[SerializeAsAny[Settings], MethodSettings("measure")]


def _one_of_each(filters: Sequence[Settings] | None) -> Sequence[Settings] | None:
    names = [f.method for f in filters or ()]  # type: ignore[attr-defined]
    for name in names:
        if names.count(name) > 1:
            raise PydanticCustomError("said", "{n} is listed twice; it may stand once", {"n": name})
    return filters


Filters = tuple[FilterSettings, ...]
Measures = tuple[MeasureSettings, ...]


class Recipe(Settings):
    """A chain of methods: invert → combine → refine → generate, and how it is cut into units."""

    invert: InvertSettings | None = None
    """How references become seeds: fixed_point unless set; only a recipe with `combine` inverts."""
    combine: CombineSettings | None = None
    """How a candidate's seed comes from reference seeds; none: the seed is random noise."""
    refine: RefineSettings | None = None
    """What is done to the seed before generating; none: nothing."""
    generate: GenerateSettings = Field(default="text_to_image", validate_default=True)  # type: ignore[assignment]
    filter: Filters | None = None
    """Replaces the build's filters for this recipe."""
    unit: int = Field(default=16, ge=1)
    """Candidates in a unit, the atom of work, retry and commit."""
    batch: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], _or_else("auto, or a whole number from 1 up")
    ] = 8
    """Candidates that go through the models together; every call has exactly this shape. auto: the
    largest that runs, tried once and kept in the store; at most 8 on a CPU, 64 on a GPU, and a unit."""

    _filters = field_validator("filter")(_one_of_each)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.batch != "auto" and self.unit % self.batch:
            raise PydanticCustomError(
                "said", "unit must be a multiple of batch, given unit {u} and batch {b}",
                {"u": self.unit, "b": self.batch},
            )  # fmt: skip
        if self.combine is None and self.invert is not None:
            raise PydanticCustomError("said", "invert makes seeds that nothing uses: set combine as well")
        generate = method_of("generate", self.generate)
        if generate.starts_from != "seed":
            for key in ("combine", "refine"):
                if getattr(self, key) is not None:
                    raise PydanticCustomError(
                        "said", "{key} makes seeds, but {method} starts from images: leave one of them out",
                        {"key": key, "method": generate.name},
                    )  # fmt: skip
        if self.combine is not None and self.invert is None:
            default = registry.resolve("invert", "fixed_point").Config()
            object.__setattr__(self, "invert", default)
        return self


class FewerThan(Settings):
    """The classes that have fewer references than this."""

    fewer_than: int = Field(ge=1)


class MostConfused(Settings):
    """The classes with which a class is most confused, one way or the other."""

    most_confused: int = Field(ge=1)
    """So many for each class, at most."""
    matrix: str = Field(min_length=1)
    """Parquet with the columns class, predicted and share, as `seedloom evaluate confusion` writes it."""


Classes = Annotated[tuple[str, ...], Field(min_length=1)]


class Target(Settings):
    """What is asked for: so many accepted images of each of these classes, or of each of these pairs."""

    classes: Annotated[
        Literal["all"] | FewerThan | Classes | None,
        _or_else("all, a list of classes, or {fewer_than: N} with N from 1 up"),
    ] = None
    pairs: Annotated[
        Annotated[tuple[tuple[str, str], ...], Field(min_length=1)] | None,
        _or_else("a list of [source, class] pairs"),
    ] = None
    """In place of classes: each pair is a target of its own, made from images of the source."""
    sources: Annotated[
        Literal["all"] | MostConfused | Classes | Annotated[dict[str, Classes], Field(min_length=1)] | None,
        _or_else("all, a list of classes, {CLASS: [source, …], …}, or {most_confused: K, matrix: FILE}"),
    ] = None
    """Whose images a recipe starts from that starts from other classes (genie): all others unless set."""
    accepted: int = Field(ge=1)
    """Quota: accepted images of each class or pair."""
    attempts: float = Field(default=8, ge=1)
    """At most so many candidates for each image of the quota, rounded up to whole units."""
    recipe: Annotated[
        str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None,
        _or_else("the name of a recipe, or {NAME: SHARE, …} with shares above 0"),
    ] = None
    """The recipe, or several with their shares of the accepted images; may be left out when there is one."""
    filter: Filters | None = None
    """Replaces the recipe's and the build's filters for these classes."""

    _filters = field_validator("filter")(_one_of_each)

    @model_validator(mode="after")
    def _classes_or_pairs(self) -> Target:
        if (self.classes is None) == (self.pairs is None):
            raise PydanticCustomError("said", "must name classes or pairs, one of the two")
        if self.pairs is not None and self.sources is not None:
            raise PydanticCustomError("said", "pairs name their sources themselves: leave out sources")
        return self


class Shard(Settings):
    samples: int = Field(default=1000, ge=1)
    """Images in a shard; the last one may hold fewer."""
    image: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = Field(default=96, ge=1, le=100)
    """Of JPEG and WebP (100 is lossless WebP); PNG ignores it."""
    window: int = Field(default=8, ge=1)
    """Rows are shuffled within windows of so many shards; one task packs one window."""


class Run(Settings):
    """How the work is run. Nothing here changes what is made."""

    runner: Literal["ray", "local"] = "ray"
    workers: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"], _or_else("auto, or a whole number from 1 up")
    ] = "auto"
    """auto: one for each share of a GPU, or for each `threads_per_worker` cores where there is no GPU; more
    or fewer when nodes come or go. Never more than there is work for."""
    device: Literal["auto", "gpu"] = "auto"
    """auto: the GPUs of the cluster, or its CPUs when it has none as the build starts. gpu: wait for GPUs,
    where nodes with some are started on demand (set `workers` as well: so many are asked for)."""
    gpus_per_worker: float = Field(default=1, gt=0)
    """A share of one GPU, or a whole number."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    cpu_workers: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"], _or_else("auto, or a whole number from 0 up")
    ] = "auto"
    """Workers without a GPU that help to pack, where the others have one; auto: one for each core."""
    labels: dict[
        str,
        Annotated[
            str | Annotated[tuple[str, ...], Field(min_length=1)], _or_else("a label, or a list of them")
        ],
    ] = Field(default_factory=dict)
    """Workers start only on nodes that have one of these labels under each key."""
    heartbeat: float = Field(default=15, gt=0)
    """Seconds between the signs of life of a run; after four without one, another run takes its place."""
    price_per_device_hour: float | None = Field(default=None, ge=0)
    """What a device costs for an hour, in any currency: a pilot then forecasts costs. A device is a GPU, or
    a worker where there is none."""
    retries: int = Field(default=3, ge=0)
    """How often a unit is tried again after its worker died or an unexpected error."""
    unit_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a worker that has completed nothing is ended and its work is tried again; longer
    than the slowest inversion, training or unit takes. None: it may take as long as it likes."""


class BuildConfig(Settings):
    """One dataset."""

    name: str = Field(default="dataset", min_length=1)
    output: str = Field(min_length=1)
    """Where everything is written: a folder or any fsspec URI."""
    rng_seed: int = 0
    backbone: BackboneSettings = BackboneSettings()
    references: References | None = None
    prompt: str = "a photo of a {class}"
    recipes: dict[str, Recipe] = Field(
        default_factory=lambda: {"default": Recipe.model_validate({"combine": "cog"})}, min_length=1
    )
    targets: tuple[Target, ...] = Field(min_length=1)
    filter: Filters = ()
    measure: Measures = ()
    """What is measured of every candidate and kept beside it, and rejects nothing."""
    shard: Shard = Shard()
    run: Run = Run()

    _filters = field_validator("filter", "measure")(_one_of_each)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, prompt: str) -> str:
        if "{class}" not in prompt or re.sub(r"\{class\}", "", prompt).count("{"):
            raise PydanticCustomError(
                "said", "must contain {needed} and no other braces, given {given}",
                {"needed": "{class}", "given": repr(prompt)},
            )  # fmt: skip
        return prompt

    @model_validator(mode="after")
    def _named_recipes(self) -> BuildConfig:
        for i, target in enumerate(self.targets):
            if target.recipe is None and len(self.recipes) > 1:
                raise PydanticCustomError(
                    "said", "targets.{i}.recipe must be set: there are several recipes ({allowed})",
                    {"i": i, "allowed": ", ".join(self.recipes)},
                )  # fmt: skip
            asked = [target.recipe] if isinstance(target.recipe, str) else list(target.recipe or ())
            for name in asked:
                if name not in self.recipes:
                    raise PydanticCustomError(
                        "said", "targets.{i}.recipe: unknown recipe {name}; allowed: {allowed}",
                        {"i": i, "name": repr(name), "allowed": ", ".join(self.recipes)},
                    )  # fmt: skip
        return self

    def shares(self, target: Target) -> dict[str, float]:
        """Recipe name → weight for a target."""
        if target.recipe is None:
            return {next(iter(self.recipes)): 1.0}
        return {target.recipe: 1.0} if isinstance(target.recipe, str) else dict(target.recipe)

    def filters(self, target: Target, recipe: str) -> tuple[Settings, ...]:
        """The filters of a target's recipe: its own, else the recipe's, else the build's."""
        for chosen in (target.filter, self.recipes[recipe].filter):
            if chosen is not None:
                return chosen
        return self.filter

    def readable(self, label: str) -> str:
        """The name of a class that people and prompts read."""
        names = getattr(self.references, "names", {})
        return names.get(label, label.replace("_", " "))

    def described(self) -> dict[str, Any]:
        """The resolved config as the build's identity sees it.

        Without `run`, and without where things lie: the same dataset elsewhere is the same dataset.
        """
        content = self.model_dump(mode="json", exclude={"run", "output"})
        if content["references"]:
            content["references"].pop("uri", None)
            content["references"].pop("lock", None)
        return content


class _Loader(yaml.SafeLoader):
    """YAML that does not let the second of two equal keys replace the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        for key, (place, _) in zip(keys, node.value, strict=False):
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=place.start_mark)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"


def load(path: str | Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """Read a config file and apply `key.path=value` overrides. Raises `UserError`."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({_flat(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a config is a mapping of keys such as `output` and `targets`")
    for override in overrides:
        _apply(content, override)
    return parse(content, str(path))


def parse(content: dict[str, Any], source: str) -> BuildConfig:
    """Validate a config that is already a mapping. `source` names it in errors."""
    try:
        return BuildConfig.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        # pydantic goes on to complain of the list or mapping around what is wrong
        inner = [e for e in found if not any(_around(e, other) for other in found)]
        raise UserError(f"{source}: " + "; ".join(_say(e) for e in inner[:3])) from error


def _around(error: Any, other: Any) -> bool:
    outer = error["loc"]
    return len(outer) < len(other["loc"]) and other["loc"][: len(outer)] == outer


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"--set {override!r}: expected key.path=value, such as rng_seed=3")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML ({_flat(error)})") from error

    def index(place: Any, key: str) -> Any:
        if isinstance(place, dict):
            return key
        if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
            return int(key)
        raise UserError(f"--set {override!r}: there is no {path!r} in the config")

    place: Any = content
    for key in parents:
        if isinstance(place, dict):
            place.setdefault(key, {})
        place = place[index(place, key)]
    place[index(place, last)] = value


def _flat(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "model_type": "must be a mapping of keys",
}


def _say(error: Any) -> str:
    """One pydantic error in words: key, what is allowed, what was given."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{where}: is missing"
    if error["type"] == "said":  # our own, which say everything themselves
        return f"{where}: {error['msg']}" if where else error["msg"]
    told = _WORDS.get(error["type"]) or error["msg"].replace("Input should be", "must be")
    return f"{where}: {told}, given {shortened(error['input'])}"
