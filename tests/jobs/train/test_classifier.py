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

from jobs.tangram.drawings import write_references
from jobs.train.classifier import classifier, log_prior
from schemas.errors import UserError

ROOT = Path(__file__).parents[3]
CLASSES = ("circle", "five_pointed_star", "ring")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Sixty drawings of each class to learn from, and thirty-one others."""
    root = tmp_path_factory.mktemp("drawn")
    write_references(root / "val", CLASSES, per_class=31)
    write_references(root / "real", CLASSES, per_class=60, rng_seed=1)
    return root / "real", root / "val"


def settings(folders: tuple[Path, Path], out: Path, **changes) -> dict:
    real, val = folders
    chosen = {"real": "1", "references": str(real), "model": "resnet10t", "image_size": 32, "workers": 0}
    return chosen | {"epochs": 6, "batch_size": 16, "learning_rate": 3e-3, "out": out, "val": val} | changes


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(built, folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    classifier(str(built), **settings(folders, out))
    return out


def test_it_learns_from_real_images_alone(trained):
    """Three classes, so that chance is a third; real=1 leaves the build's noise to the class without."""
    found = metrics(trained)
    assert found["accuracy"] > 0.6
    per_class = found["class_accuracy"]
    assert set(per_class) == set(CLASSES)
    assert np.isclose(found["mean_class_accuracy"], np.mean(list(per_class.values())))
    assert np.isclose(found["accuracy"], found["mean_class_accuracy"])  # as many of each
    assert found["images_per_epoch"] == {"circle": 60, "gear": 13, "ring": 60, "five_pointed_star": 60}
    assert len(found["history"]) == 6


def test_it_goes_on_from_its_checkpoint(built, folders, trained, tmp_path, monkeypatch):
    """Stopped after two epochs: the first two are not trained again, and those left are."""
    from jobs.train import classifier as module

    rounds = []

    def stop(*arguments):
        rounds.append(1)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        classifier(str(built), **settings(folders, tmp_path))
    assert not (tmp_path / "metrics.json").exists()
    history = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]
    assert history == metrics(trained)["history"][:2]
    classifier(str(built), **settings(folders, tmp_path))
    assert len(rounds) == 3 + 4
    assert metrics(tmp_path)["history"][:2] == history
    assert metrics(tmp_path)["accuracy"] > 0.6


def test_two_processes_see_all_held_out_images(built, folders, tmp_path):
    """93 images are not the same number for both; accuracies are multiples of one in 31."""
    real, val = folders
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--real", "once", "--references", real, "--model", "resnet10t", "--image-size", "32"]
    options += ["--epochs", "1", "--batch-size", "16", "--workers", "0", "--loss", "balanced-softmax"]
    done = subprocess.run(
        [*command, "-m", "jobs.train.classifier", built, "--val", val, "--out", tmp_path, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path)
    for accuracy in found["class_accuracy"].values():
        assert np.isclose(accuracy * 31, round(accuracy * 31))
    assert np.isclose(found["accuracy"] * 93, sum(found["class_accuracy"].values()) * 31)
    assert found["images_per_epoch"] == {"circle": 73, "gear": 13, "ring": 73, "five_pointed_star": 60}


def test_the_shift_is_the_share_of_each_class():
    assert torch.allclose(log_prior([10, 30, 60]).exp(), torch.tensor([0.1, 0.3, 0.6]))
    assert torch.isfinite(log_prior([5, 0])).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "focal"}, "--loss 'focal': allowed are cross-entropy"),
        ({"real": "many"}, "--real 'many'"),
        ({"val": Path("/nowhere")}, "--val /nowhere"),
        ({"references": None, "real": "0"}, "--val .*the class 'five_pointed_star' is none of circle, gear"),
    ],
)
def test_what_it_cannot_train_on(built, folders, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        classifier(str(built), **settings(folders, tmp_path, **changes))
    assert not list(tmp_path.iterdir())
