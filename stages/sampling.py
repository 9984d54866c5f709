"""The denoising loop for ε-, v- and flow-prediction. Every method draws images through it.

Song et al., "Denoising diffusion implicit models", arXiv:2010.02502, Eq. 12 with σ = 0: with z = a·x_0 + s·n
a step takes x̂0 and ε̂ of the model's output to the next (a, s). On a rectified flow that is Euler's step
along dz/dσ. DPM-Solver++(2M): Lu et al., arXiv:2211.01095, Algorithm 2, which extrapolates x̂0 from the step
before. Classifier-free guidance: Ho & Salimans, arXiv:2207.12598, with diffusers' sign, ε̃ = ε_∅ + g·(ε_c −
ε_∅). v-prediction: Salimans & Ho, arXiv:2202.00512, Appendix D. Where the steps are: `stages.schedule`.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from stages.contract import Backbone, Sampler, Text
from stages.memory import EVERYTHING, Memory
from stages.schedule import Level, Path, Prediction


def path_of(backbone: Backbone, sampler: Sampler) -> Path:
    """The times and noise levels of the sampler on this backbone."""
    return backbone.schedule.path(sampler.steps, sampler.scheduler)


def to_x0(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    level: Level,
    prediction: Prediction,
) -> Float[Tensor, "B C H W"]:
    """x̂0 from the model's output at a noise level."""
    match prediction:
        case "epsilon":
            return (z_BCHW - level.noise * output_BCHW) / level.signal
        case "v_prediction":
            return level.signal * z_BCHW - level.noise * output_BCHW
        case "flow":
            return z_BCHW - level.noise * output_BCHW


def to_epsilon(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    level: Level,
    prediction: Prediction,
) -> Float[Tensor, "B C H W"]:
    """The noise n from the model's output at a noise level."""
    match prediction:
        case "epsilon":
            return output_BCHW
        case "v_prediction":
            return level.signal * output_BCHW + level.noise * z_BCHW
        case "flow":
            return z_BCHW + level.signal * output_BCHW


def output_of(
    x0_BCHW: Float[Tensor, "B C H W"],
    noise_BCHW: Float[Tensor, "B C H W"],
    level: Level,
    prediction: Prediction,
) -> Float[Tensor, "B C H W"]:
    """What a model says that knows x_0 and the noise: the target of training."""
    match prediction:
        case "epsilon":
            return noise_BCHW
        case "v_prediction":
            return level.signal * noise_BCHW - level.noise * x0_BCHW
        case "flow":
            return noise_BCHW - x0_BCHW


def ddim_step(
    z_BCHW: Float[Tensor, "B C H W"],
    output_BCHW: Float[Tensor, "B C H W"],
    start: Level,
    end: Level,
    prediction: Prediction,
) -> Float[Tensor, "B C H W"]:
    """One step of Eq. 12: from the noise level where the model was asked to another one."""
    x0_BCHW = to_x0(z_BCHW, output_BCHW, start, prediction)
    epsilon_BCHW = to_epsilon(z_BCHW, output_BCHW, start, prediction)
    return end.signal * x0_BCHW + end.noise * epsilon_BCHW


def multistep(
    z_BCHW: Float[Tensor, "B C H W"],
    x0_BCHW: Float[Tensor, "B C H W"],
    previous_BCHW: Float[Tensor, "B C H W"],
    before: Level,
    start: Level,
    end: Level,
) -> Float[Tensor, "B C H W"]:
    """One step of DPM-Solver++(2M): x̂0 is extrapolated in λ = log(a/s) from that at the level before."""
    ratio = (_log_snr(end) - _log_snr(start)) / (_log_snr(start) - _log_snr(before))
    ahead_BCHW = x0_BCHW + ratio / 2 * (x0_BCHW - previous_BCHW)
    shrink = end.noise / start.noise
    return shrink * z_BCHW + (end.signal - shrink * start.signal) * ahead_BCHW


def _log_snr(level: Level) -> float:
    return math.log(level.signal / level.noise)


@dataclass(frozen=True)
class Condition:
    """What the model is asked for: a text for each row, the text it is pushed away from, and how much."""

    text: Text
    negative: Text
    guidance: float  # g: 1 is none, and then the negative text is not looked at


# A prompt, a condition, or the condition of step k, chosen when its latents z_BCHW are known.
Ask = str | Condition | Callable[[int, Tensor], Condition]


def condition(
    backbone: Backbone, prompt: str | Sequence[str], guidance: float, batch: int, negative: str = ""
) -> Condition:
    """The condition of one prompt for all rows, or of one a row. `negative`: no words unless given."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return Condition(
        backbone.embed(prompts).expand(batch), backbone.embed([negative]).expand(batch), guidance
    )


def predict_guided(
    backbone: Backbone, z_BCHW: Float[Tensor, "B C H W"], t: float, asked: Condition
) -> Float[Tensor, "B C H W"]:
    """The model's output under guidance: one call of B rows when g = 1, else one of 2B."""
    if asked.guidance == 1:
        return backbone.predict(z_BCHW, t, asked.text)
    both = backbone.predict(torch.cat([z_BCHW, z_BCHW]), t, Text.cat([asked.negative, asked.text]))
    unconditional_BCHW, conditional_BCHW = both.chunk(2)
    return unconditional_BCHW + asked.guidance * (conditional_BCHW - unconditional_BCHW)


def add_noise(
    z0_BCHW: Float[Tensor, "B C H W"], noise_BCHW: Float[Tensor, "B C H W"], level: Level
) -> Float[Tensor, "B C H W"]:
    """The latent at a noise level: a·z_0 + s·n."""
    return level.signal * z0_BCHW + level.noise * noise_BCHW


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
    memory: Memory = EVERYTHING,
) -> Float[Tensor, "B C H W"]:
    """From latents before step `first` to latents after all steps before `last`: by default from z_T to z_0.

    `callback(k, z_BCHW)` sees the latents after each step k; `correct(k, before, after)` may replace those
    after it. `memory` decides which steps keep their activations for a backward pass, and which are run
    again; whether there is a graph at all is the caller's `torch.no_grad`.
    A sampler of second order takes its first step here, wherever that is, at first order.
    """
    path, prediction = path_of(backbone, sampler), backbone.schedule.prediction
    if isinstance(ask, str):
        ask = condition(backbone, ask, sampler.guidance, len(z_BCHW))
    if first == 0 and path.start != 1:
        z_BCHW = path.start * z_BCHW
    previous_BCHW: Tensor | None = None  # x̂0 of the step before
    for k in range(first, sampler.steps if last is None else last):
        asked = ask if isinstance(ask, Condition) else ask(k, z_BCHW)
        start, end = path.levels[k], path.levels[k + 1]

        def step(
            z_BCHW: Tensor,
            previous_BCHW: Tensor | None,
            k: int = k,
            asked: Condition = asked,
            start: Level = start,
            end: Level = end,
        ) -> tuple[Tensor, Tensor | None]:
            output_BCHW = predict_guided(backbone, z_BCHW, path.times[k], asked)
            if path.order == 1:
                return ddim_step(z_BCHW, output_BCHW, start, end, prediction), None
            x0_BCHW = to_x0(z_BCHW, output_BCHW, start, prediction)
            if previous_BCHW is None or end.noise == 0:
                return ddim_step(z_BCHW, output_BCHW, start, end, prediction), x0_BCHW
            before = path.levels[k - 1]
            return multistep(z_BCHW, x0_BCHW, previous_BCHW, before, start, end), x0_BCHW

        before_BCHW = z_BCHW
        z_BCHW, previous_BCHW = memory.run(step, z_BCHW, previous_BCHW)
        if correct is not None:
            z_BCHW = correct(k, before_BCHW, z_BCHW)
        if callback is not None:
            callback(k, z_BCHW)
    return z_BCHW
