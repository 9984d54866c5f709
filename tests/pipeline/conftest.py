"""A folder of reference drawings. What it is for, and how a test makes a small build: tests/small_build.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_build import CLASSES


@pytest.fixture(scope="session")
def _drawn(tmp_path_factory) -> Path:
    from jobs.tangram.drawings import write_references

    folder = tmp_path_factory.mktemp("drawn") / "references"
    write_references(folder, CLASSES, per_class=4)
    return folder


@pytest.fixture
def references(_drawn, tmp_path) -> Path:
    """An ImageFolder of three classes with four drawings each, the test's own to change."""
    return shutil.copytree(_drawn, tmp_path / "references")
