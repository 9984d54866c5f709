"""The pipeline's classifier and, apart from it, the judge: two timm networks on balanced drawings.

They differ in architecture and in the seed of their drawings. The judge measures; no method and no filter
may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from jobs.tangram.data import balanced, epoch_batch, to_model
from jobs.tangram.degrade import degrade, mixed_up
from jobs.tangram.drawings import CLASSES
from jobs.tangram.training import Schedule, fit

BATCH = 64
PER_CLASS = 1200  # drawings
LABEL_SMOOTHING = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One of the two networks: its timm name, the arguments, and the split and seed of its drawings."""

    split: str
    architecture: str
    args: dict[str, Any]
    schedule: Schedule
    rng_seed: int


PLANS: dict[str, Plan] = {
    "classifier": Plan(
        split="classifier",
        architecture="resnet10t",
        args={"channels": [48, 96, 160, 224], "num_classes": len(CLASSES)},
        schedule=Schedule(steps=2400, learning_rate=2e-3, average=0.995),
        rng_seed=11,
    ),
    "judge": Plan(
        split="judge",
        architecture="dla46_c",
        args={"num_classes": len(CLASSES)},
        schedule=Schedule(steps=1800, learning_rate=2e-3, average=0.995),
        rng_seed=22,
    ),
}


def new_classifier(name: str) -> nn.Module:
    """The untrained network of a plan: pixels (B, 3, 64, 64) in -1..1 to logits (B, 24)."""
    torch.manual_seed(PLANS[name].rng_seed)
    return timm.create_model(PLANS[name].architecture, pretrained=False, **PLANS[name].args)


def train_classifier(
    name: str, checkpoint: Path, *, steps: int | None = None, resume: bool = True
) -> dict[str, float]:
    """Train the classifier or the judge; the averaged weights end up in `checkpoint`."""
    plan = PLANS[name]
    data = balanced(plan.split, PER_CLASS, plan.rng_seed)
    model = new_classifier(name)
    target_NK = F.one_hot(data.labels, len(CLASSES)).float()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = epoch_batch(len(data.pixels), BATCH, step, name, plan.rng_seed)
        x, target = mixed_up(degrade(to_model(data.pixels[rows]), generator), target_NK[rows], generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), target, label_smoothing=LABEL_SMOOTHING)

    schedule = plan.schedule.lasting(steps)
    return fit(name, model, loss_at, schedule, checkpoint, rng_seed=plan.rng_seed, resume=resume)
