"""One training loop for every part of tangram: resumable after any kill, and the same weights each time.

A step's batch and noise come from a generator made of (part, seed, step), so there is no random state to
save: model, optimizer, average and step number are the whole state. The learning rate warms up, stays, and
falls linearly to zero over the last third, so a training may be prolonged until its fall begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

LossAt = Callable[[int, torch.Generator], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a part learns."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    warm_up: int = 200  # steps
    fall: float = 1 / 3  # share of the steps in which the learning rate falls to zero
    average: float = 0.998  # decay per step of the moving average of the weights
    save_every: int = 200  # steps

    def lasting(self, steps: int | None) -> Schedule:
        """The same schedule over another number of steps; None keeps its own."""
        return self if steps is None else replace(self, steps=steps)

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / max(1.0, self.fall * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up, left)


def step_generator(part: str, rng_seed: int, step: int) -> torch.Generator:
    """The generator of one step: hashed, so that neighbouring steps and seeds share nothing."""
    digest = hashlib.sha256(f"tangram/{part}/{rng_seed}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fit(
    part: str,
    model: nn.Module,
    loss_at: LossAt,
    schedule: Schedule,
    checkpoint: Path,
    *,
    rng_seed: int = 0,
    resume: bool = True,
    stop_at: int | None = None,
) -> dict[str, float]:
    """Train `model` in place and leave the averaged weights in it. Returns steps and wall seconds.

    `loss_at(step, generator)` returns a scalar. `stop_at` ends before the schedule does, as a kill would.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    step, seconds = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, seconds = state["average"], state["step"], state["seconds"]
    model.train()
    started, report, losses = time.monotonic() - seconds, 50, []
    last = schedule.steps if stop_at is None else min(stop_at, schedule.steps)
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_at(step, step_generator(part, rng_seed, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        _move_average(average, model, min(schedule.average, step / (step + 10)))
        losses.append(loss.detach())
        if step % report == 0 or step == last:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            print(
                f"{part}: step {step}/{schedule.steps} loss {mean:.5f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if step % schedule.save_every == 0 or step == last:
            seconds = time.monotonic() - started
            _save(checkpoint, model, optimizer, average, step, seconds)
    model.load_state_dict(average)
    model.eval()
    return {"steps": float(step), "seconds": seconds}


def record_run(checkpoint: Path, run: dict[str, float]) -> None:
    """Keep steps, wall seconds and threads of a finished training beside its checkpoint, for the card."""
    run = {**run, "threads": float(torch.get_num_threads())}
    checkpoint.with_suffix(".json").write_text(json.dumps(run) + "\n")


def recorded_run(checkpoint: Path) -> dict[str, float] | None:
    """What `record_run` kept, or None where the training has not come to its end."""
    path = checkpoint.with_suffix(".json")
    return json.loads(path.read_text()) if path.exists() else None


def averaged(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint, also of a training that still runs."""
    return torch.load(checkpoint, weights_only=True)["average"]


@torch.no_grad()
def _move_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _save(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, torch.Tensor],
    step: int,
    seconds: float,
) -> None:
    """Write aside, sync, then replace: a kill leaves the older or the newer checkpoint, never half of one."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = checkpoint.with_suffix(f".{os.getpid()}.tmp")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "step": step,
        "seconds": seconds,
    }
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, checkpoint)
