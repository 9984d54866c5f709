"""CADS: noise on the condition that fades while the image is drawn.

Sadat et al., "CADS: unleashing the diversity of diffusion models through condition-annealed sampling",
arXiv:2310.17347. At step k of n, with t = 1 − k/n and y the embedding of the prompt,

    ŷ = √γ·y + s·√(1−γ)·n,    γ(t) = 1 up to τ1, (τ2 − t)/(τ2 − τ1) between, 0 from τ2 on,
    y' = ψ·rescaled + (1 − ψ)·ŷ,    rescaled = (ŷ − mean ŷ)/s.d. ŷ · s.d. y + mean y,

with one mean and one s.d. for a whole embedding (and for the pooled embedding, of backbones that read one).
Early steps, which decide the composition, hardly see the prompt; from t ≤ τ1 on they see it as it is.

Readings: the noise is fresh in every step and on the condition alone, as descriptions of the paper say. The
published web-UI extension also noises the unconditional half (`noised: both`) and reseeds in each step, which
keeps its noise constant in time; that is not offered. The constants are those of all implementations for
Stable Diffusion; the paper's own table was not at hand. Its dynamic classifier-free guidance is left out.

Shape letters: B batch, C H W latent, D the shape of an embedding.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Generate, Generated, Models, Need, Order
from stages.generate.noise import row_noise
from stages.generate.settings import SamplerSettings
from stages.sampling import Condition, condition, denoise


def gamma(t: float, tau1: float, tau2: float) -> float:
    """The share γ of the condition that is left at time t: 1 is the image, t = 1 is the noise."""
    return min(max((tau2 - t) / (tau2 - tau1), 0.0), 1.0)


def anneal(
    text: Float[Tensor, B * D],
    noise: Float[Tensor, B * D],
    share: float,
    scale: float,
    psi: float,
) -> Float[Tensor, B * D]:
    """The condition with noise, γ = `share`; for γ = 1 the very condition."""
    if share == 1:
        return text
    noised = share**0.5 * text + scale * (1 - share) ** 0.5 * noise
    standard = (noised - _mean(noised)) / _deviation(noised)
    rescaled = standard * _deviation(text) + _mean(text)
    return psi * rescaled + (1 - psi) * noised


def _mean(text: Tensor) -> Tensor:
    return text.mean(dim=tuple(range(1, text.ndim)), keepdim=True)


def _deviation(text: Tensor) -> Tensor:
    return text.std(dim=tuple(range(1, text.ndim)), keepdim=True)


@registry.method("cads")
class Cads(Generate):
    """Images of the prompt from seeds; the prompt is heard late."""

    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    class Config(SamplerSettings):
        method: Literal["cads"] = "cads"
        tau1: float = Field(0.6, ge=0, lt=1)
        """τ1, in units of the whole path from image (0) to noise (1): the condition is clean up to here."""
        tau2: float = Field(0.9, gt=0, le=1)
        """τ2, in the same units: from here on the condition is noise alone."""
        scale: float = Field(0.25, gt=0)
        """s: deviation of the noise, in the units of the embedding. 0.25 for Stable Diffusion."""
        psi: float = Field(1.0, ge=0, le=1)
        """ψ: 1 keeps the embedding's mean and s.d., 0 lets the noise change them."""
        noised: Literal["condition", "both"] = "condition"
        """condition: the prompt alone; both: the unconditional half too, with noise of its own."""

        @model_validator(mode="after")
        def _order(self) -> Cads.Config:
            if self.tau1 >= self.tau2:
                raise PydanticCustomError(
                    "said",
                    "tau1 {tau1} and tau2 {tau2} given; tau1 must be the smaller one",
                    {"tau1": self.tau1, "tau2": self.tau2},
                )
            return self

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        config, streams = self.config, [chance.own() for chance in order.chances]

        def ask(k: int, z_BCHW: Tensor) -> Condition:
            share = gamma((config.steps - k) / config.steps, config.tau1, config.tau2)

            def noised(text: Tensor) -> Tensor:
                return anneal(text, row_noise(streams, text), share, config.scale, config.psi)

            text = clean.text.map(noised)  # first, so that its noise is the same either way
            negative = clean.negative.map(noised) if config.noised == "both" else clean.negative
            return Condition(text, negative, config.guidance)

        with torch.no_grad():
            clean = condition(backbone, order.prompt, config.guidance, len(order.z_BCHW))
            z0_BCHW = denoise(backbone, order.z_BCHW, ask, self.sampler())
            return Generated(backbone.decode(z0_BCHW).clamp(-1, 1))
