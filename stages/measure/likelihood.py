"""Likelihood: log-density of an image's latent under the backbone, by its probability-flow ODE.

Song et al., arXiv:2011.13456, §4.3 and Appendix D.2: the flow that takes a latent z to noise z_T is a change
of variables,

    log p(z) = log N(z_T; 0, I) + log |det ∂z_T/∂z|,

and log |det| is the integral of the flow's divergence, estimated with fixed random probes v by
E[vᵀ(∂ε/∂z)v] (Hutchinson).

The flow is DDIM's (Song et al., arXiv:2010.02502, Eq. 14): with σ = √((1−ᾱ)/ᾱ) and y = z/√ᾱ it is dy/dσ = ε,
and a rectified flow is the same with 1−t/T in place of √ᾱ. Scaling is then outside the integral and exact,

    log |det ∂z_T/∂z| = d/2·log(ᾱ_T/ᾱ_0) + ∫ tr(∂ε/∂y) dσ,   ∂ε/∂y = √ᾱ·∂ε/∂z,

and what is left is the divergence of ε alone. y is advanced in σ by Heun's rule, and the integral is taken by
the trapezoidal rule in log σ, where a direction of standard deviation s adds σ²/(s²+σ²): between 0 and 1, and
smooth on one scale for every s. Both are of second order. The grid has `steps` steps of about equal length
in log σ between the first and the last training timestep, each at a timestep of its own; near the image,
where timesteps are few, they are the limit, and more steps bring no more accuracy there. A step asks the
model twice and differentiates it once; one step's memory at a time.

The latent is the encoded image, taken as it is at the smallest noise level of the training schedule, ᾱ_0. The
text is the class's prompt or none, without guidance: a guided sampler has no density.

Not bits per dimension: `log2p_per_dim` is log₂ p(z)/d of the latent, and higher is likelier (bits per
dimension would be its negative). MinorityPrompt's tables (Um & Ye, arXiv:2410.07838) say "bpd likelihood
(lower = rarer)", which is this direction. It says nothing of pixels: the VAE's part in the density is left
out.

Departures: fixed steps in place of an adaptive solver, so that the cost of an image does not depend on it and
rows of a batch do not depend on each other; Rademacher probes in place of Gaussian ones (smaller variance,
none for a diagonal Jacobian), the same for all images, so that images compare.

Shape letters: B images, P probes, C H W latent (d numbers), h w image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import random_stream
from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Measure, Models, Question, Text
from stages.sampling import to_epsilon
from stages.schedule import Level


def grid(backbone: Backbone, steps: int) -> list[int]:
    """`steps` + 1 timesteps from the first to the last, about evenly in log σ; none stands twice."""
    ladder = backbone.schedule.ladder
    level = np.log([sigma_of(backbone.schedule.level(t)) for t in ladder])
    last = len(level) - 1
    if not 1 <= steps <= last:
        raise UserError(f"likelihood: {steps} steps given; this backbone has 1 to {last}")
    places = [0]
    for k, wanted in enumerate(np.linspace(level[0], level[-1], steps + 1)[1:], start=1):
        nearest = int(np.abs(level - wanted).argmin())
        places.append(min(max(nearest, places[-1] + 1), last - (steps - k)))
    return [ladder[place] for place in places]


def sigma_of(level: Level) -> float:
    """σ = s/a, which is √((1−ᾱ)/ᾱ) of a diffusion."""
    return level.noise / level.signal


def probes(count: int, shape: tuple[int, int, int]) -> Float[Tensor, "P C H W"]:
    """Rademacher probes, always the same; more of them begin with the fewer."""
    signs = 2 * random_stream("likelihood probes").integers(0, 2, (count, *shape)) - 1
    return torch.from_numpy(signs).double()


def epsilon_and_trace(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    t: int,
    text: Text,
    probe_PCHW: Float[Tensor, "P C H W"],
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """ε at timestep t, and for each row the mean of vᵀ(∂ε/∂z)v over the probes v."""
    with torch.enable_grad():
        z_BCHW = z_BCHW.detach().requires_grad_()
        epsilon_BCHW = _epsilon(backbone, z_BCHW, t, text)
        trace_B = torch.zeros(len(z_BCHW), dtype=torch.float64, device=z_BCHW.device)
        for number, probe_CHW in enumerate(probe_PCHW, start=1):
            # rows do not mix, so one product gives each row its own
            (product_BCHW,) = torch.autograd.grad(
                epsilon_BCHW,
                z_BCHW,
                probe_CHW.expand_as(epsilon_BCHW),
                retain_graph=number < len(probe_PCHW),
            )
            trace_B += (product_BCHW * probe_CHW).sum(dim=(1, 2, 3))
    return epsilon_BCHW.detach(), trace_B / len(probe_PCHW)


def _epsilon(backbone: Backbone, z_BCHW: Tensor, t: int, text: Text) -> Tensor:
    schedule = backbone.schedule
    return to_epsilon(z_BCHW, backbone.predict(z_BCHW, t, text), schedule.level(t), schedule.prediction)


def log_likelihood(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    text: Text,
    steps: int,
    probe_PCHW: Float[Tensor, "P C H W"],
) -> Float[Tensor, " B"]:
    """log p(z) of each row in nats, in float64, for latents at the noise level of the first timestep."""
    times = grid(backbone, steps)
    levels = [backbone.schedule.level(t) for t in times]
    first, last = levels[0], levels[-1]
    y_BCHW = z_BCHW.double() / first.signal
    slope_BCHW, trace_B = epsilon_and_trace(backbone, first.signal * y_BCHW, times[0], text, probe_PCHW)
    density_B = first.noise * trace_B  # d log|det| / d log σ
    log_det_B = torch.zeros_like(density_B)
    for (start, _), (end, t) in pairwise(zip(levels, times, strict=True)):
        h = sigma_of(end) - sigma_of(start)
        with torch.no_grad():
            ahead_BCHW = _epsilon(backbone, end.signal * (y_BCHW + h * slope_BCHW), t, text)
        y_BCHW = y_BCHW + h / 2 * (slope_BCHW + ahead_BCHW)
        before_B = density_B
        slope_BCHW, trace_B = epsilon_and_trace(backbone, end.signal * y_BCHW, t, text, probe_PCHW)
        density_B = end.noise * trace_B
        log_det_B = log_det_B + math.log(sigma_of(end) / sigma_of(start)) / 2 * (before_B + density_B)
    noise_BCHW, d = last.signal * y_BCHW, z_BCHW[0].numel()
    log_prior_B = -(noise_BCHW.square().sum(dim=(1, 2, 3)) + d * math.log(2 * math.pi)) / 2
    return log_prior_B + d * math.log(last.signal / first.signal) + log_det_B


@registry.method("likelihood")
class Likelihood(Measure):
    version = 2
    uses_backbone = True

    class Config(Settings):
        method: Literal["likelihood"] = "likelihood"
        steps: int = Field(20, ge=1)
        """Steps of the solver; each asks the model twice and differentiates it once. Our own choice: within
        0.025 bits a dimension of the closed form where the data are Gaussian; the error falls as 1/steps²."""
        probes: int = Field(1, ge=1)
        """Random probes of the divergence; each differentiates the model once more in every step. Our own
        choice: all images have the same, so that less of their error is in a comparison."""
        prompt: Literal["class", "none"] = "class"
        """Likelihood of the image given the prompt of its class, or given no words."""

    def scored(self) -> Mapping[str, Any]:
        return self.config.model_dump()

    def columns(self) -> tuple[str, ...]:
        return ("log2p_per_dim",)

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[float]]:
        backbone, config = models.backbone(), self.config
        prompt = question.prompt if config.prompt == "class" else ""
        with torch.no_grad():
            z_BCHW = backbone.encode(image_B3hw.to(backbone.device))
            text = backbone.embed([prompt]).expand(len(z_BCHW))
        probe_PCHW = probes(config.probes, backbone.latent_shape).to(z_BCHW.device)
        log_p_B = log_likelihood(backbone, z_BCHW, text, config.steps, probe_PCHW)
        return {"log2p_per_dim": (log_p_B / (math.log(2) * z_BCHW[0].numel())).tolist()}
