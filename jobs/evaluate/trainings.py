"""Trainings of the small network, one process for each core; each is kept, and is never done twice."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from jobs.evaluate import small_network as net


@dataclass(frozen=True)
class Training:
    """All that a training depends on, and where its figures stay."""

    images: net.Images
    judged: net.Images
    classes: int
    loss: net.Loss
    augmentation: net.Augmentation
    epochs: int
    rng_seed: int
    kept: Path


def accuracies(trainings: Sequence[Training]) -> list[dict[str, np.ndarray]]:
    """For each training the accuracy of each class (K), by the losses that come of it."""
    if missing := list({one.kept: one for one in trainings if not one.kept.exists()}.values()):
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            list(pool.map(_carry_out, missing))
    return [_read(one.kept) for one in trainings]


def _carry_out(training: Training) -> None:
    torch.set_num_threads(1)
    images, judged = training.images, training.judged
    model = net.train(
        images, training.classes, loss=training.loss, augmentation=training.augmentation,
        epochs=training.epochs, rng_seed=training.rng_seed,
    )  # fmt: skip
    logit_NK = net.logits(model, judged)
    found = {str(training.loss): net.accuracy_of_classes(logit_NK, judged)}
    if training.loss == "cross-entropy":
        adjusted_NK = net.adjusted(logit_NK, net.log_prior(images.counts(training.classes)))
        found["logit adjustment"] = net.accuracy_of_classes(adjusted_NK, judged)
    training.kept.parent.mkdir(parents=True, exist_ok=True)
    part = training.kept.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **found)  # type: ignore[arg-type]
    os.replace(part, training.kept)


def _read(kept: Path) -> dict[str, np.ndarray]:
    with np.load(kept) as found:
        return dict(found)
