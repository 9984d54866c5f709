"""Builds small enough for tests, and methods whose results a test can foresee.

`make_config(folder)` writes a config that builds in about a second on one core: tangram at one step, three
classes of four drawings, and a filter whose scores have nothing to do with how good an image is. Use it with
the fixture `references`, which tests/pipeline/conftest.py and tests/jobs/conftest.py hand on:

    path = make_config(tmp_path, references)                      # the YAML file; the output is tmp_path/out
    path = make_config(tmp_path, references, rng_seed=5, run={"runner": "ray", "workers": 2})

A keyword replaces the whole top-level key. `seedloom build PATH` must run in the root of the repository,
where Python finds this module by its name.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from schemas.records import Verdict
from schemas.settings import Settings
from stages.contract import (
    Backbone,
    Chance,
    Filter,
    Generate,
    Generated,
    Models,
    Order,
    Question,
    Refine,
    Refined,
    Sampler,
)

CLASSES = ("circle", "gear", "ring")


@pytest.fixture(scope="session")
def drawings(tmp_path_factory) -> Path:
    """An ImageFolder of three classes with four drawings each. To be read only."""
    from jobs.tangram.drawings import write_references

    folder = tmp_path_factory.mktemp("drawings") / "references"
    write_references(folder, CLASSES, per_class=4)
    return folder


@pytest.fixture
def references(drawings, tmp_path) -> Path:
    """The same, the test's own to change."""
    return shutil.copytree(drawings, tmp_path / "references")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def seedloom(monkeypatch, capsys) -> Callable[..., Ended]:
    """The command line in this process: `seedloom("plan", path)`. A traceback fails the test."""
    from jobs.cli import main

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["seedloom", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own handlers stay
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


def make_config(folder: Path, references: Path | None = None, /, **overrides: Any) -> Path:
    """Write `folder`/dataset.yaml; keywords replace top-level keys. Returns its path."""
    content: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "out"),
        "rng_seed": 1,
        "recipes": {"plain": noise_recipe()},
        "targets": [{"classes": list(CLASSES), "accepted": 6, "attempts": 8}],
        "filter": [{"method": "tests.small_build:HashFilter", "least": 0.5}],
        "shard": {"samples": 4, "window": 2},
        "run": {"runner": "local"},
    }
    if references is not None:
        content["references"] = {"uri": str(references)}
        content["recipes"] = {"mixed": seeds_recipe()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump({**content, **overrides}))
    return path


def noise_recipe(**overrides: Any) -> dict[str, Any]:
    """Random noise, one sampling step."""
    return {
        "generate": {"method": "text_to_image", "steps": 1, "guidance": 1},
        "unit": 4,
        "batch": 2,
    } | overrides


def seeds_recipe(**overrides: Any) -> dict[str, Any]:
    """Reference seeds, inverted in two steps and combined."""
    invert = {"method": "ddim", "steps": 2}
    return noise_recipe(invert=invert, combine={"method": "cog"}) | overrides


def fraction(data: bytes) -> float:
    """A number in [0, 1) that every bit of `data` decides."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2**48


class HashFilter(Filter):
    """A score from the hash of the decoded pixels: deterministic, and blind to what they show."""

    class Config(Settings):
        method: str
        least: float = Field(default=0.5, ge=0, le=1)

    def scored(self) -> Mapping[str, Any]:
        return {}

    def columns(self) -> tuple[str, ...]:
        return ("fraction",)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        salt = type(self).__name__.encode()
        return {"fraction": [fraction(salt + image.numpy().tobytes()) for image in image_B3hw]}

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        score, least = scores["fraction"], self.config.least
        name = type(self).__name__
        return Verdict(score >= least, f"{name}.fraction", score, least, f"{score} and at least {least}")


class OtherHashFilter(HashFilter):
    """Another filter: other scores for the same images."""


class Sketch(Generate):
    """Pictures that are the seeds themselves, enlarged: no network, and each depends on its own row alone."""

    class Config(Settings):
        method: str

    def sampler(self) -> Sampler:
        return Sampler(steps=1, guidance=1.0)

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        return Generated(F.interpolate(order.z_BCHW[:, :3], (backbone.image_size,) * 2).tanh())


class Poisoned(Sketch):
    """The same, but raises for a share of the seeds, each time again."""

    class Config(Settings):
        method: str
        share: float = 0.2

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        if any(fraction(z_CHW.numpy().tobytes()) < self.config.share for z_CHW in order.z_BCHW):
            raise ValueError("poison")
        return super().__call__(backbone, models, order)


class Shaken(Refine):
    """Seeds with noise added, by each row's own chance."""

    class Config(Settings):
        method: str

    def check(self, sampler: Sampler, models: Models, target: str) -> None:
        if target == "gear":
            raise UserError("gears are not to be shaken")

    def __call__(self, backbone: Backbone, models: Models, order: Order, sampler: Sampler) -> Refined:
        noises = [self.noise(chance, backbone.latent_shape) for chance in order.chances]
        return Refined(order.z_BCHW + torch.stack(noises), [[float(i)] * i for i in range(len(noises))])

    @staticmethod
    def noise(chance: Chance, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(chance.own().standard_normal(shape, dtype=np.float32))


def sketch_recipe(**overrides: Any) -> dict[str, Any]:
    """Random noise, drawn as it is: next to nothing to compute."""
    return noise_recipe(generate="tests.small_build:Sketch") | overrides


def shard_hashes(manifest: Any) -> list[tuple[str, str]]:
    """What two builds must share to be the same dataset."""
    return [(shard.tar_sha256, shard.parquet_sha256) for shard in manifest.shards]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder → (size, time of change in ns): equal when nothing was written."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def parts_of(output: Path) -> set[str]:
    """The committed parts, as stream/unit."""
    return {f"{p.parent.name}/{p.stem}" for p in sorted(Path(output, "parts").glob("*/*.parquet"))}
