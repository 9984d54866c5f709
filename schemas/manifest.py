"""The manifest: written last, it names every shard with its hash. Readers trust only what it names.

It holds nothing that differs between two runs of one build: no times, hosts, worker counts or locations.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from schemas.errors import UserError
from schemas.sealed import seal, unseal
from schemas.settings import Settings

VERSION = 4


class Shard(Settings):
    name: str  # "000123": of shards/000123.tar and shards/000123.parquet
    rows: int
    tar_bytes: int
    tar_sha256: str
    parquet_bytes: int
    parquet_sha256: str


class SeedsAccount(Settings):
    """used + refused are the references that were inverted."""

    used: int
    refused: dict[str, str]  # origin of the reference → why its seed is not combined
    correlation: float | None  # mean cosine of the used seeds


class RecipeAccount(Settings):
    """candidates = accepted + sum(rejected) + surplus + failed; quota = accepted + missing."""

    quota: int
    accepted: int
    candidates: int
    rejected: dict[str, int]  # rule → count
    surplus: int
    failed: int
    missing: int
    exhausted: bool
    seeds: SeedsAccount | None = None  # of a recipe that combines some
    objects: tuple[
        str, ...
    ] = ()  # folders of the store that it was made from; none are named before format 4


class TargetAccount(Settings):
    label: str  # the class
    class_index: int
    prompt: str
    admitted: int
    quarantined: int
    recipes: dict[str, RecipeAccount]


class Manifest(Settings):
    version: int = VERSION
    build_id: str
    name: str
    samples: int
    classes: tuple[str, ...]  # in the order of their class index
    targets: dict[str, TargetAccount]  # by name: a class, or "source -> class"
    quarantined: dict[str, int]  # class → files set aside, over all classes of the references
    shards: tuple[Shard, ...]
    files: dict[str, str] = Field(description="other files of the build → sha256")
    models: dict[str, str]
    environments: tuple[dict[str, str], ...]  # of its parts; the same bytes are claimed only where it is one

    @property
    def shortfall(self) -> int:
        return sum(r.missing for t in self.targets.values() for r in t.recipes.values())

    def to_bytes(self) -> bytes:
        return seal(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Manifest:
        """Raises `Damaged` for a changed byte and `UserError` for a newer format."""
        content: dict[str, Any] = unseal(data, name)
        if content["version"] > VERSION:
            raise UserError(
                f"{name}: written by a newer seedloom (format {content['version']}); upgrade to read it"
            )
        if content["version"] < 3:  # a target was a class then
            for label, target in content["targets"].items():
                target["label"] = label
        return cls.model_validate(content)
