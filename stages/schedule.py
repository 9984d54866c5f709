"""Noise schedules: how much image and how much noise a latent has, and where a sampler asks the model.

At every time t of training a latent is z = a·x_0 + s·n, and `Level` is the pair (a, s):

- diffusion (Ho et al., arXiv:2006.11239): a = √ᾱ_t, s = √(1−ᾱ_t), t a whole number from 0 to T−1;
- rectified flow (Liu et al., arXiv:2209.03003; Esser et al., arXiv:2403.03206): a = 1−σ, s = σ = t/T, t above
  0 to T.

A sampler by name is a path: the times at which it asks the model, and the levels between which it steps.
Times are those of diffusers' scheduler of that name, made from the checkpoint's own scheduler config:

- ddim: `DDIMScheduler`. Departure: a step ends where the next one begins. diffusers ends it at t − T//n,
  which is another timestep when "trailing" or "linspace" spacing does not divide T evenly; then its steps do
  not join up, and an inversion has no path to walk back on. Where they do join up, the two agree to rounding.
- euler: `EulerDiscreteScheduler`. In z/√ᾱ its steps are DDIM's; its times differ, a time may lie between two
  timesteps, the path ends at the image itself, and with "trailing" and "linspace" it starts from √(1−ᾱ)·n.
- lightning: euler at "trailing" times whatever the checkpoint says, as SDXL-Lightning and the Turbo models
  are drawn (Lin et al., arXiv:2402.13929).
- dpm_solver++: `DPMSolverMultistepScheduler` of order 2, midpoint (Lu et al., arXiv:2211.01095, Algorithm 2).
- flow: `FlowMatchEulerDiscreteScheduler`, with its shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from torch import Tensor

from schemas.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "flow"]
SchedulerName = Literal["ddim", "euler", "lightning", "dpm_solver++", "flow"]

SPACINGS = ("leading", "trailing", "linspace")
DEFAULT_SPACING = {
    "ddim": "leading",
    "euler": "linspace",
    "lightning": "trailing",
    "dpm_solver++": "linspace",
}
LEAST_ALPHA = 2.0**-24  # in place of ᾱ = 0 where a sampler divides by it, as in diffusers


@dataclass(frozen=True)
class Level:
    """z = signal·x_0 + noise·n."""

    signal: float
    noise: float

    @property
    def angle(self) -> float:
        """φ with tan φ = s/a: 0 without noise, π/2 for nothing else."""
        return math.atan2(self.noise, self.signal)

    @property
    def scale(self) -> float:
        """√(a² + s²), the deviation of a latent whose image has deviation 1; 1 of a diffusion."""
        return math.hypot(self.signal, self.noise)


@dataclass(frozen=True)
class Path:
    """A sampler's way from noise to image."""

    times: tuple[float, ...]  # where the model is asked
    levels: tuple[Level, ...]  # at each of these times, and after the last step
    start: float = 1.0  # what the sampler multiplies noise of variance 1 by
    order: Literal[1, 2] = 1  # 2: a step also uses the prediction of the step before it


class Diffusion:
    """The schedule of an ε- or v-model, from ᾱ of its training and the config of its scheduler."""

    schedulers: tuple[SchedulerName, ...] = ("ddim", "euler", "lightning", "dpm_solver++")

    def __init__(self, prediction: Prediction, alphas_cumprod: Tensor, config: Mapping[str, Any]):
        self.prediction = prediction
        self.alphas_cumprod = alphas_cumprod.double().cpu()  # (T,)
        self.spacing: str | None = config.get("timestep_spacing")  # None: each scheduler's own
        self.steps_offset = int(config.get("steps_offset", 0))
        self.set_alpha_to_one = bool(config.get("set_alpha_to_one", True))
        self._path = lru_cache(self._path_uncached)

    @property
    def total(self) -> int:
        """T, the timesteps of training."""
        return len(self.alphas_cumprod)

    @property
    def ladder(self) -> range:
        """Times of training, from little noise to much, at which there is some of image and of noise."""
        return range(self.total if self.alphas_cumprod[-1] > 0 else self.total - 1)

    def level(self, t: float) -> Level:
        """At time t; between two timesteps s/a is interpolated, as in diffusers."""
        if t == int(t):
            return _preserving(float(self.alphas_cumprod[int(t)]))
        alpha = self.alphas_cumprod.clamp(min=LEAST_ALPHA).numpy()
        ratio = float(np.interp(t, np.arange(self.total), np.sqrt((1 - alpha) / alpha)))
        return _preserving(1 / (1 + ratio**2))

    def path(self, steps: int, scheduler: SchedulerName | None = None) -> Path:
        """The sampler's path; ddim unless said. Raises `UserError` for too few or too many steps."""
        return self._path(steps, scheduler or "ddim")

    def _path_uncached(self, steps: int, scheduler: SchedulerName) -> Path:
        if scheduler not in self.schedulers:
            raise UserError(
                f"scheduler {scheduler} given, and a backbone of {self.prediction}; allowed: "
                f"{', '.join(self.schedulers)}"
            )
        if not 1 <= steps <= self.total:
            raise UserError(f"{steps} sampling steps given; this backbone has 1 to {self.total}")
        spacing = "trailing" if scheduler == "lightning" else self.spacing or DEFAULT_SPACING[scheduler]
        times = self._times(steps, scheduler, spacing)
        if times[0] >= self.total:
            raise UserError(
                f"{steps} sampling steps given; the first would be at timestep {times[0]:.0f}, "
                f"and this backbone's are 0 to {self.total - 1}: give fewer steps"
            )
        if len(set(times)) < steps:
            raise UserError(
                f"{steps} steps of {scheduler} given, two of them at one timestep: give fewer steps"
            )
        if scheduler == "ddim":
            last = 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])
            return Path(times, (*map(self.level, times), _preserving(last)))
        levels = (*map(self._positive, times), _preserving(1.0))
        if scheduler == "dpm_solver++":
            return Path(times, levels, order=2)
        return Path(times, levels, start=1.0 if spacing == "leading" else levels[0].noise)

    def _times(self, steps: int, scheduler: SchedulerName, spacing: str) -> tuple[float, ...]:
        """From noise to image, spaced as in arXiv:2305.08891, Table 2."""
        ascending: np.ndarray
        total = self.total
        if spacing == "trailing":
            # numpy's float range may add an element at 0; diffusers keeps it, we do not.
            ascending = np.round(np.arange(total, 0, -total / steps))[:steps][::-1] - 1
        elif scheduler == "dpm_solver++":  # its grids have one point more, which it does not use
            if spacing == "leading":
                ascending = np.arange(steps + 1)[1:] * (total // (steps + 1)) + self.steps_offset
            else:
                ascending = np.linspace(0, total - 1, steps + 1).round()[1:]
        elif spacing == "leading":
            ascending = np.arange(steps) * (total // steps) + self.steps_offset
        else:
            ascending = np.linspace(0, total - 1, steps)
            if scheduler == "ddim":
                ascending = ascending.round()
        # euler's times are float32 in diffusers, and so are the model's
        return tuple(int(t) if t == int(t) else float(np.float32(t)) for t in ascending[::-1])

    def _positive(self, t: float) -> Level:
        level = self.level(t)
        return level if level.signal > 0 else _preserving(LEAST_ALPHA)


class Flow:
    """The schedule of a rectified flow, whose output is dz/dσ = n − x_0."""

    schedulers: tuple[SchedulerName, ...] = ("flow",)
    prediction: Prediction = "flow"

    def __init__(self, total: int = 1000, shift: float = 1.0):
        self.total, self.shift = total, shift
        self._path = lru_cache(self._path_uncached)

    @property
    def ladder(self) -> range:
        return range(1, self.total)

    def level(self, t: float) -> Level:
        return Level(1 - t / self.total, t / self.total)

    def path(self, steps: int, scheduler: SchedulerName | None = None) -> Path:
        return self._path(steps, scheduler or "flow")

    def _path_uncached(self, steps: int, scheduler: SchedulerName) -> Path:
        if scheduler != "flow":
            raise UserError(f"scheduler {scheduler} given, and a flow-matching backbone; allowed: flow")
        if not 1 <= steps <= self.total:
            raise UserError(f"{steps} sampling steps given; this backbone has 1 to {self.total}")
        # evenly from 1 to the σ of the first training time, which diffusers has shifted once already
        first = self._shifted(1 / self.total)
        sigmas = [self._shifted(s) for s in np.linspace(1.0, first, steps).tolist()]
        times = tuple(sigma * self.total for sigma in sigmas)
        return Path(times, (*(Level(1 - sigma, sigma) for sigma in sigmas), Level(1.0, 0.0)))

    def _shifted(self, sigma: float) -> float:
        """Esser et al., Eq. 23."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


Schedule = Diffusion | Flow


def _preserving(alpha: float) -> Level:
    return Level(alpha**0.5, (1 - alpha) ** 0.5)
