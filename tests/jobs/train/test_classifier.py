"""The example training job: it learns, goes on where it stopped, and counts held-out images once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.tangram.drawings import draw, generator, write_references
from jobs.train.classifier import classifier, log_prior
from schemas.errors import UserError

ROOT = Path(__file__).parents[3]
CLASSES = ("circle", "five_pointed_star", "ring")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Sixty drawings of each class to learn from, and thirty others."""
    root = tmp_path_factory.mktemp("drawn")
    write_references(root / "val", CLASSES, per_class=30)
    write_references(root / "real", CLASSES, per_class=60, rng_seed=1)
    return root / "real", root / "val"


def train(built: Path, folders: tuple[Path, Path], out: Path, **changes) -> dict:
    real, val = folders
    arguments = {"real": "1", "references": str(real), "model": "resnet10t", "image_size": 32, "workers": 0}
    arguments |= {"epochs": 5, "batch_size": 16, "learning_rate": 3e-3, "out": out, "val": val}
    classifier(str(built), **(arguments | changes))
    return json.loads((out / "metrics.json").read_text())


def test_it_learns_from_real_images_alone(built, folders, tmp_path):
    """Three classes, so that chance is a third; real=1 uses none of the build's noise."""
    metrics = train(built, folders, tmp_path)
    assert metrics["accuracy"] > 0.6
    per_class = metrics["class_accuracy"]
    assert set(per_class) == set(CLASSES)
    assert np.isclose(metrics["mean_class_accuracy"], np.mean(list(per_class.values())))
    assert np.isclose(metrics["accuracy"], metrics["mean_class_accuracy"])  # thirty of each
    assert metrics["images_per_epoch"] == {"circle": 60, "gear": 13, "ring": 60, "five_pointed_star": 60}
