"""Fixed-point inversion: every step of the sampler is undone exactly, by solving for where it began.

The start of a step is the fixed point z = F(z) of the step walked backwards, F(z) = (z_low + sin Δ·v(z))/cos
Δ (`stages.invert.rotation`; a flow's latents are walked as a diffusion's), and is found by iteration: Pan et
al. (AIDI), arXiv:2309.04907, also with Anderson's acceleration; Meiri et al., arXiv:2312.12540v1; Garibi et
al. (ReNoise), arXiv:2403.14602. The sampler then draws the latent back to the tolerance, however few its
steps: invert with the steps and the guidance that images are drawn with.

What an iteration changes, |F(z) − z|, is (up to cos Δ) the distance by which the sampler's step from z misses
z_low, so each iteration checks the one before. It need not fall, and a row ends with the best that is known:
the iterate that follows the one with the smallest change or, if later ones were worse, that one itself.

`start_noise`: images are cleaner than what a sampler draws that ends at ᾱ < 1, with noise of √(1−ᾱ) left in
its latents. No typical seed leads to such an image; the exact one is too short and heavy-tailed, the more so
the finer the last steps of the sampler are. A little noise on the latent mends that, and stays in the latent
that is drawn. Staniszewski et al., arXiv:2410.23530, replace the first steps of an inversion by noise for the
same reason.

Departures: v is iterated instead of ε, which has the same fixed point and holds at ᾱ = 0. The first guess of
a step takes v from the two steps before it, extrapolated in φ, which costs no call and saves about one a
step. Acceleration has a memory of one: where F turns the error round instead of shrinking it, plain iteration
stalls, and so does averaging near the image, where F shrinks it slowly. No regularisation and no averaging of
ε. The noise is added below the first step instead of replacing it, so that it can be smaller than a step, and
derives from the image, so that an image has one seed.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from schemas.ids import random_stream, sha256
from stages import registry
from stages.contract import Backbone, Invert, Inverted, Sampler
from stages.invert.measure import measured
from stages.invert.rotation import path_of, step_back, velocity, velocity_between
from stages.invert.settings import InvertSettings
from stages.sampling import denoise
from stages.schedule import Level


def fixed_point(
    f: Callable[[Tensor], Tensor], z_BCHW: Float[Tensor, "B C H W"], iterations: int, tolerance: float
) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]:
    """z = f(z), row by row, and how many values of f each row needed.

    A row is done when f moves it by no more than `tolerance` (root mean square), and keeps its value while
    others go on. f must treat rows apart.
    """
    best_BCHW = answer_BCHW = last_BCHW = step_BCHW = z_BCHW
    least_B = torch.full((len(z_BCHW),), torch.inf, dtype=torch.float64, device=z_BCHW.device)
    asked_B = torch.zeros(len(z_BCHW), dtype=torch.int64, device=z_BCHW.device)
    open_B = torch.ones(len(z_BCHW), dtype=torch.bool, device=z_BCHW.device)
    for iteration in range(iterations):
        f_BCHW = f(z_BCHW)
        asked_B += open_B
        before_BCHW, step_BCHW = step_BCHW, f_BCHW - z_BCHW
        next_BCHW = f_BCHW if iteration == 0 else anderson(step_BCHW, before_BCHW, f_BCHW, last_BCHW)
        residual_B = step_BCHW.double().square().mean(dim=(1, 2, 3)).sqrt()
        better_B = open_B & ((residual_B < least_B) | (iteration == 0))
        best_BCHW = _where(better_B, z_BCHW, best_BCHW)
        answer_BCHW = _where(better_B, next_BCHW, _where(open_B, best_BCHW, answer_BCHW))
        least_B = torch.where(better_B, residual_B, least_B)
        z_BCHW, last_BCHW = _where(open_B, next_BCHW, z_BCHW), f_BCHW
        open_B = open_B & residual_B.isfinite() & (residual_B > tolerance)
        if not open_B.any():
            break
    return answer_BCHW, asked_B


def anderson(
    step_BCHW: Float[Tensor, "B C H W"],
    before_BCHW: Float[Tensor, "B C H W"],
    f_BCHW: Float[Tensor, "B C H W"],
    last_BCHW: Float[Tensor, "B C H W"],
) -> Float[Tensor, "B C H W"]:
    """f(z) moved along f(z) − f(last), as far as would make the step f(z) − z shortest were f linear.

    `before_BCHW` is the step from the last iterate. Anderson, J. ACM 12 (1965), with a memory of one.
    """
    change_BCHW = (step_BCHW - before_BCHW).double()
    along_B = (change_BCHW * step_BCHW).sum(dim=(1, 2, 3))
    share_B = along_B / change_BCHW.square().sum(dim=(1, 2, 3)).clamp(min=1e-30)  # no change: no share
    return (f_BCHW - share_B[:, None, None, None] * (f_BCHW - last_BCHW)).to(f_BCHW.dtype)


def _where(of_B: Tensor, yes_BCHW: Tensor, no_BCHW: Tensor) -> Tensor:
    return torch.where(of_B[:, None, None, None], yes_BCHW, no_BCHW)


def invert_fixed_point(
    backbone: Backbone,
    z0_BCHW: Float[Tensor, "B C H W"],
    prompt: str,
    sampler: Sampler,
    iterations: int,
    tolerance: float,
) -> tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]:
    """The seeds from which the sampler draws z_0, and how often the model was asked for each row."""
    path = path_of(backbone, sampler)
    y_BCHW, v_BCHW = z0_BCHW / path.levels[-1].scale, torch.zeros_like(z0_BCHW)
    rate_BCHW = torch.zeros_like(z0_BCHW)  # dv/dφ along the last step
    calls_B = torch.zeros(len(z0_BCHW), dtype=torch.int64, device=z0_BCHW.device)
    for k in reversed(range(len(path.times))):
        low, high = path.levels[k + 1], path.levels[k]
        delta = high.angle - low.angle

        def again(
            guess_BCHW: Tensor, k: int = k, y_BCHW: Tensor = y_BCHW, low: Level = low, high: Level = high
        ) -> Tensor:
            z_BCHW = high.scale * guess_BCHW
            v_BCHW = velocity(backbone, z_BCHW, path.times[k], high, prompt, sampler.guidance)
            return step_back(y_BCHW, v_BCHW, low, high)

        guess_BCHW = step_back(y_BCHW, v_BCHW + delta * rate_BCHW, low, high)
        high_BCHW, asked_B = fixed_point(again, guess_BCHW, iterations, tolerance)
        before_BCHW, v_BCHW = v_BCHW, velocity_between(y_BCHW, high_BCHW, low, high)
        if k < len(path.times) - 1:  # two steps are needed to know a rate
            rate_BCHW = (v_BCHW - before_BCHW) / delta
        y_BCHW = high_BCHW
        calls_B += asked_B
    return path.levels[0].scale * y_BCHW, calls_B


def noise_of(
    image_B3hw: Float[Tensor, "B 3 h w"], z0_BCHW: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """Standard normal noise for each latent, drawn from the hash of its image.

    Each image has its own, and always the same: seeds whose start shares its noise share most of themselves.
    """
    hashes = [sha256(row.numpy().tobytes()) for row in image_B3hw.detach().float().cpu().contiguous()]
    rows = [random_stream("start_noise", digest).standard_normal(z0_BCHW.shape[1:]) for digest in hashes]
    return torch.from_numpy(np.stack(rows)).to(z0_BCHW)


@registry.method("fixed_point")
class FixedPoint(Invert):
    """Seeds from which the sampler, with the same steps and guidance, draws the images again."""

    class Config(InvertSettings):
        method: Literal["fixed_point"] = "fixed_point"
        steps: int = Field(20, ge=1)
        """Sampler steps, best as many as images are drawn with: for these the seeds are exact."""
        iterations: int = Field(10, ge=1)
        """Model calls in a step, at most. Two or three suffice but in the step nearest to the image."""
        tolerance: float = Field(1e-3, gt=0)
        """A step is solved when an iteration changes its latent by no more: root mean square; noise has 1."""
        start_noise: float = Field(0.05, ge=0)
        """Standard deviation of the noise that is added to the latent first, which itself has about 1. The
        latent that is drawn keeps it: an error of its square. 0: the image itself is drawn again. The default
        is what made tangram's seeds typical (`seedloom evaluate inversion`)."""

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        sampler = Sampler(self.config.steps, self.config.guidance)
        with torch.no_grad():
            z0_BCHW = backbone.encode(image_B3hw)
            start_BCHW = z0_BCHW
            if self.config.start_noise > 0:
                start_BCHW = z0_BCHW + self.config.start_noise * noise_of(image_B3hw, z0_BCHW)
            z_BCHW, asked_B = invert_fixed_point(
                backbone, start_BCHW, prompt, sampler, self.config.iterations, self.config.tolerance
            )
            again_BCHW = denoise(backbone, z_BCHW, prompt, sampler)
        calls_B = asked_B * (1 if sampler.guidance == 1 else 2)
        return Inverted(z_BCHW, measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls_B.tolist()))
