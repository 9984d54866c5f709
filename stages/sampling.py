"""The denoising loop: deterministic DDIM for ε- and v-prediction. Every method draws images through it.

Song et al., "Denoising diffusion implicit models", arXiv:2010.02502, Eq. 12 with σ = 0. Classifier-free
guidance: Ho & Salimans, arXiv:2207.12598, with diffusers' sign, ε̃ = ε_∅ + g·(ε_c − ε_∅). v-prediction:
Salimans & Ho, arXiv:2202.00512, Appendix D. Timesteps are those of diffusers' `DDIMScheduler`.

Departure: a step ends where the next one begins. diffusers ends it at t − T//n, which is another timestep
when "trailing" or "linspace" spacing does not divide T evenly; then its steps do not join up, and an
inversion has no path to walk back on. Where they do join up, the two agree to rounding.

Shape letters: B batch, C H W latent, L D text tokens and width. ᾱ is `alpha`, a float64 scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from schemas.errors import UserError
from stages.contract import Backbone, Sampler


def timesteps(backbone: Backbone, steps: int) -> list[int]:
    """Training timesteps from noise to image, spaced as the backbone's schedule says (arXiv:2305.08891)."""
    total = len(backbone.alphas_cumprod)
    if not 1 <= steps <= total:
        raise UserError(f"{steps} sampling steps given; this backbone has 1 to {total}")
    ascending: np.ndarray
    match backbone.timestep_spacing:
        case "leading":
            ascending = np.arange(steps) * (total // steps) + backbone.steps_offset
        case "trailing":
            # numpy's float range may add an element at 0; diffusers keeps it, we do not.
            ascending = np.round(np.arange(total, 0, -total / steps))[:steps][::-1] - 1
        case "linspace":
            ascending = np.linspace(0, total - 1, steps).round()
    if ascending[-1] >= total:
        raise UserError(
            f"{steps} sampling steps given; the first would be at timestep {ascending[-1]:.0f}, "
            f"and this backbone's are 0 to {total - 1}: give fewer steps"
        )
    return [int(t) for t in ascending[::-1]]


def alphas(backbone: Backbone, steps: list[int]) -> list[float]:
    """ᾱ along the path: at each of the descending `steps`, and after the last one."""
    return [float(backbone.alphas_cumprod[t]) for t in steps] + [backbone.final_alpha_cumprod]


def to_x0(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    alpha: float,
    prediction_type: str,
) -> Float[Tensor, "B C H W"]:
    """x̂0 from the model's output at noise level ᾱ."""
    if prediction_type == "epsilon":
        return (z_BCHW - (1 - alpha) ** 0.5 * output_BCHW) / alpha**0.5
    return alpha**0.5 * z_BCHW - (1 - alpha) ** 0.5 * output_BCHW


def to_epsilon(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    alpha: float,
    prediction_type: str,
) -> Float[Tensor, "B C H W"]:
    """ε from the model's output at noise level ᾱ."""
    if prediction_type == "epsilon":
        return output_BCHW
    return alpha**0.5 * output_BCHW + (1 - alpha) ** 0.5 * z_BCHW


def ddim_step(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    alpha_from: float,
    alpha_to: float,
    prediction_type: str,
) -> Float[Tensor, "B C H W"]:
    """One step of Eq. 12: from noise level ᾱ_from, where the model was asked, to ᾱ_to."""
    x0_BCHW = to_x0(z_BCHW, output_BCHW, alpha_from, prediction_type)
    epsilon_BCHW = to_epsilon(z_BCHW, output_BCHW, alpha_from, prediction_type)
    return alpha_to**0.5 * x0_BCHW + (1 - alpha_to) ** 0.5 * epsilon_BCHW


def predict_guided(
    backbone: Backbone, z_BCHW: Float[Tensor, "B C H W"], t: int, prompt: str, guidance: float
) -> Float[Tensor, "B C H W"]:
    """The model's output under guidance: one call of B rows when g = 1, else one of 2B.

    The unconditional branch is the empty prompt.
    """
    batch = len(z_BCHW)
    text_BLD = backbone.embed([prompt]).expand(batch, -1, -1)
    if guidance == 1:
        return backbone.predict(z_BCHW, t, text_BLD)
    empty_BLD = backbone.embed([""]).expand(batch, -1, -1)
    both = backbone.predict(torch.cat([z_BCHW, z_BCHW]), t, torch.cat([empty_BLD, text_BLD]))
    unconditional_BCHW, conditional_BCHW = both.chunk(2)
    return unconditional_BCHW + guidance * (conditional_BCHW - unconditional_BCHW)


def denoise(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    prompt: str,
    sampler: Sampler,
    *,
    callback: Callable[[int, Tensor], None] | None = None,
    checkpoint: bool = False,
) -> Float[Tensor, "B C H W"]:
    """From seeds z_T to latents z_0. `callback(k, z_BCHW)` sees the latents after each step k = 0, 1, …

    With `checkpoint`, a backward pass recomputes each step instead of keeping its activations: the memory
    of one step, the same gradient. Whether there is a graph at all is the caller's `torch.no_grad`.
    """
    path = timesteps(backbone, sampler.steps)
    levels = alphas(backbone, path)
    for k, t in enumerate(path):

        def step(z_BCHW: Tensor, k: int = k, t: int = t) -> Tensor:
            output_BCHW = predict_guided(backbone, z_BCHW, t, prompt, sampler.guidance)
            return ddim_step(z_BCHW, output_BCHW, levels[k], levels[k + 1], backbone.prediction_type)

        z_BCHW = recompute(step, z_BCHW, use_reentrant=False) if checkpoint else step(z_BCHW)
        if callback is not None:
            callback(k, z_BCHW)
    return z_BCHW
