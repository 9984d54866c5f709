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
    GetCoreSchemaHandler,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry
from stages.backbones.latent_diffusion import BackboneSettings
from stages.read.settings import ReadSettings


class MethodSettings:
    """Pydantic annotation: the settings of a method of one kind, chosen by the key `tag`.

    Accepts a mapping, or the bare name of a method for its defaults. A user's own class is named by its
    import path and brings its own settings class.
    """

    def __init__(self, kind: str, tag: str = "method", default: str | None = None):
        self.kind, self.tag, self.default = kind, tag, default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {n: handler(registry.resolve(self.kind, n).Config) for n in registry.names(self.kind)}

        def foreign(value: Any, built_in: Any) -> Any:
            if isinstance(value, Settings):
                return value
            if isinstance(value, str):
                value = {self.tag: value}
            if isinstance(value, dict) and self.tag not in value and self.default:
                value = {self.tag: self.default, **value}
            if isinstance(value, dict) and ":" in str(value.get(self.tag)):
                try:
                    cls = registry.resolve(self.kind, value[self.tag])
                except UserError as error:
                    raise PydanticCustomError("method", "{reason}", {"reason": str(error)}) from error
                return cls.Config.model_validate(value)
            return built_in(value)

        return core_schema.no_info_wrap_validator_function(
            foreign,
            core_schema.tagged_union_schema(choices, discriminator=self.tag),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.model_dump(mode="json")
            ),
        )


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


def _one_of_each(filters: Sequence[Settings] | None) -> Sequence[Settings] | None:
    names = [f.method for f in filters or ()]  # type: ignore[attr-defined]
    for name in names:
        if names.count(name) > 1:
            raise PydanticCustomError("filter", "{n} is listed twice; a filter may stand once", {"n": name})
    return filters


Filters = tuple[FilterSettings, ...]


class Recipe(Settings):
    """A chain of methods: invert → combine → refine → generate, and how it is cut into units."""

    invert: InvertSettings | None = None
    """How references become seeds; DDIM when `combine` is set. Not run for a recipe without `combine`."""
    combine: CombineSettings | None = None
    """How a candidate's seed comes from reference seeds; none: the seed is random noise."""
    refine: RefineSettings | None = None
    """What is done to the seed before generating; none: nothing."""
    generate: GenerateSettings = Field(default="text_to_image", validate_default=True)  # type: ignore[assignment]
    filter: Filters | None = None
    """Replaces the build's filters for this recipe."""
    unit: int = Field(default=16, ge=1)
    """Candidates in a unit, the atom of work, retry and commit."""
    batch: int = Field(default=8, ge=1)
    """Candidates that go through the models together; every call has exactly this shape."""

    _filters = field_validator("filter")(_one_of_each)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.unit % self.batch:
            raise PydanticCustomError(
                "batch", "unit must be a multiple of batch, given unit {u} and batch {b}",
                {"u": self.unit, "b": self.batch},
            )  # fmt: skip
        if self.combine is None and self.invert is not None:
            raise PydanticCustomError("invert", "invert makes seeds that nothing uses: set combine as well")
        if self.combine is not None and self.invert is None:
            default = registry.resolve("invert", "ddim").Config()
            object.__setattr__(self, "invert", default)
        return self


class FewerThan(Settings):
    """The classes that have fewer references than this."""

    fewer_than: int = Field(ge=1)


class Target(Settings):
    """What is asked for: so many accepted images of each of these classes."""

    classes: Literal["all"] | FewerThan | tuple[str, ...]
    accepted: int = Field(ge=1)
    """Quota: accepted images of each class."""
    attempts: float = Field(default=8, ge=1)
    """At most so many candidates for each image of the quota, rounded up to whole units."""
    recipe: str | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """The recipe, or several with their shares of the accepted images; may be left out when there is one."""
    filter: Filters | None = None
    """Replaces the recipe's and the build's filters for these classes."""

    _filters = field_validator("filter")(_one_of_each)


class Shard(Settings):
    samples: int = Field(default=1000, ge=1)
    """Images in a shard; the last one may hold fewer."""
    image: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = Field(default=95, ge=1, le=100)
    """Of JPEG and WebP (100 is lossless WebP); PNG ignores it."""
    window: int = Field(default=8, ge=1)
    """Rows are shuffled within windows of so many shards; one task packs one window."""


class Run(Settings):
    """How the work is run. Nothing here changes what is made."""

    runner: Literal["ray", "local"] = "ray"
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: one for each GPU, or for each `threads_per_worker` cores where there is none."""
    gpus_per_worker: float = Field(default=1, gt=0)
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    retries: int = Field(default=3, ge=0)
    """How often a unit is tried again after its worker died or an unexpected error."""


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
    shard: Shard = Shard()
    run: Run = Run()

    _filters = field_validator("filter")(_one_of_each)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, prompt: str) -> str:
        if "{class}" not in prompt or re.sub(r"\{class\}", "", prompt).count("{"):
            raise PydanticCustomError(
                "prompt", "must contain {{class}} and no other braces, given {given}", {"given": repr(prompt)}
            )
        return prompt

    @model_validator(mode="after")
    def _named_recipes(self) -> BuildConfig:
        for i, target in enumerate(self.targets):
            if target.recipe is None and len(self.recipes) > 1:
                raise PydanticCustomError(
                    "recipe", "targets.{i}.recipe must be set: there are several recipes ({allowed})",
                    {"i": i, "allowed": ", ".join(self.recipes)},
                )  # fmt: skip
            asked = [target.recipe] if isinstance(target.recipe, str) else list(target.recipe or ())
            for name in asked:
                if name not in self.recipes:
                    raise PydanticCustomError(
                        "recipe", "targets.{i}.recipe: unknown recipe {name}; allowed: {allowed}",
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


def load(path: str | Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """Read a config file and apply `key.path=value` overrides. Raises `UserError`."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML ({problem})") from error
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
        raise UserError(f"{source}: " + "; ".join(_say(e) for e in error.errors()[:3])) from error


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r}: expected key.path=value, such as rng_seed=3")
    *parents, last = path.split(".")
    place: Any = content
    for key in [*parents, last]:
        inside_list = isinstance(place, list)
        if not isinstance(place, dict | list) or (
            inside_list and not (key.isdigit() and int(key) < len(place))
        ):
            raise UserError(f"--set {override!r}: there is no {path!r} in the config")
        index: Any = int(key) if inside_list else key
        if key is last and place is not None:
            place[index] = yaml.safe_load(text)
            return
        place = place[index] if inside_list else place.setdefault(index, {})


def _say(error: Any) -> str:
    """One pydantic error in words: key, what is allowed, what was given."""
    # A tagged union adds the tag to the location ("filter.0.clip.margin"); a person wrote "filter.0.margin".
    where = ".".join(str(part) for part in error["loc"] if part not in ("tuple[str, ...]", "FewerThan"))
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where}: unknown key; see `seedloom schema` for the allowed ones"
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "union_tag_invalid":
        allowed = f"{context['expected_tags']}, or package.module:Class"
        return f"{where}: unknown method {context['tag']!r}; allowed: {allowed}"
    if kind == "union_tag_not_found":
        return f"{where}: must name a method, as in {{method: NAME}}"
    if kind in ("method", "filter", "batch", "invert", "prompt", "recipe"):
        return f"{where}: {error['msg']}" if where else error["msg"]
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, given {error['input']!r}"
