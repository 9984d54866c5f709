"""Builds in the test's own process, on the local runner, and what they left behind.

`config(folder)` is `make_config` with random noise drawn as it is, so that a build computes next to nothing.
Test files ask for the fixture `one_backbone`, because loading tangram takes longer than most of these builds:

    pytestmark = pytest.mark.usefixtures("one_backbone")
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.build import make_runner
from pipeline.build import Result, build, repack
from pipeline.config import load
from tests.small_build import make_config, parts_of, sketch_recipe

HASH, OTHER = "tests.small_build:HashFilter", "tests.small_build:OtherHashFilter"
SKETCH = {"plain": sketch_recipe()}


@pytest.fixture
def one_backbone(monkeypatch, tangram):
    """Every build gets the loaded tangram."""
    monkeypatch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)


class Silent:
    """Telemetry that nobody watches."""

    def __getattr__(self, name):
        return lambda *arguments, **facts: None


def run(path: Path, *overrides: str) -> Result:
    return build(load(path, overrides), Silent(), make_runner)


def packed(path: Path, *overrides: str) -> Any:
    return repack(load(path, overrides), Silent())


def config(folder: Path, references: Path | None = None, **changes: Any) -> Path:
    return make_config(folder, references, **{"recipes": SKETCH, **changes})


def fresh(tmp_path: Path, path: Path, *overrides: str) -> tuple[Result, set[str]]:
    """The same config into an output of its own; the result and its parts."""
    output = tmp_path / f"fresh-{uuid.uuid4().hex}"
    return run(path, *overrides, f"output={output}"), parts_of(output)


def accounts(result: Result) -> dict[str, Any]:
    return {
        f"{label} / {name}": account
        for label, target in result.manifest.targets.items()
        for name, account in target.recipes.items()
    }


def rows(output: Path, kind: str = "parts") -> list[dict[str, Any]]:
    return [
        row for path in sorted(output.glob(f"{kind}/**/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
