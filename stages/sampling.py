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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

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


@dataclass(frozen=True)
class Condition:
    """What the model is asked for: a text for each row, the text it is pushed away from, and how much."""

    text_BLD: Float[Tensor, "B L D"]
    negative_BLD: Float[Tensor, "B L D"]
    guidance: float  # g: 1 is none, and then the negative text is not looked at


# A prompt, a condition, or the condition of step k, chosen when its latents z_BCHW are known.
Ask = str | Condition | Callable[[int, Tensor], Condition]


def condition(
    backbone: Backbone, prompt: str | Sequence[str], guidance: float, batch: int, negative: str = ""
) -> Condition:
    """The condition of one prompt for all rows, or of one a row. `negative`: no words unless given."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    text_BLD = backbone.embed(prompts).expand(batch, -1, -1)
    return Condition(text_BLD, backbone.embed([negative]).expand(batch, -1, -1), guidance)


def predict_guided(
    backbone: Backbone, z_BCHW: Float[Tensor, "B C H W"], t: int, asked: Condition
) -> Float[Tensor, "B C H W"]:
    """The model's output under guidance: one call of B rows when g = 1, else one of 2B."""
    if asked.guidance == 1:
        return backbone.predict(z_BCHW, t, asked.text_BLD)
    both = backbone.predict(torch.cat([z_BCHW, z_BCHW]), t, torch.cat([asked.negative_BLD, asked.text_BLD]))
    unconditional_BCHW, conditional_BCHW = both.chunk(2)
    return unconditional_BCHW + asked.guidance * (conditional_BCHW - unconditional_BCHW)


def add_noise(
    z0_BCHW: Float[Tensor, "B C H W"], noise_BCHW: Float[Tensor, "B C H W"], alpha: float
) -> Float[Tensor, "B C H W"]:
    """The latent at noise level ᾱ: √ᾱ·z_0 + √(1−ᾱ)·n."""
    return alpha**0.5 * z0_BCHW + (1 - alpha) ** 0.5 * noise_BCHW


def steps_of(ratio: float, steps: int) -> int:
    """⌊r·steps⌋: how many of the sampler's last steps draw an image at noise ratio r, a decimal number."""
    return int(Fraction(str(ratio)) * steps)


def denoise(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    ask: Ask,
    sampler: Sampler,
    *,
    first: int = 0,
    last: int | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    correct: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    checkpoint: bool = False,
) -> Float[Tensor, "B C H W"]:
    """From latents before step `first` to latents after all steps before `last`: by default from z_T to z_0.

    `callback(k, z_BCHW)` sees the latents after each step k; `correct(k, before, after)` may replace those
    after it. With `checkpoint`, a backward pass recomputes each step instead of keeping its activations: the
    memory of one step, the same gradient. Whether there is a graph at all is the caller's `torch.no_grad`.
    """
    path = timesteps(backbone, sampler.steps)
    levels = alphas(backbone, path)
    if isinstance(ask, str):
        ask = condition(backbone, ask, sampler.guidance, len(z_BCHW))
    for k in range(first, sampler.steps if last is None else last):
        asked = ask if isinstance(ask, Condition) else ask(k, z_BCHW)

        def step(z_BCHW: Tensor, k: int = k, asked: Condition = asked) -> Tensor:
            output_BCHW = predict_guided(backbone, z_BCHW, path[k], asked)
            return ddim_step(z_BCHW, output_BCHW, levels[k], levels[k + 1], backbone.prediction_type)

        before_BCHW = z_BCHW
        z_BCHW = recompute(step, z_BCHW, use_reentrant=False) if checkpoint else step(z_BCHW)
        if correct is not None:
            z_BCHW = correct(k, before_BCHW, z_BCHW)
        if callback is not None:
            callback(k, z_BCHW)
    return z_BCHW
