"""SGMS: self-guided sampling of minorities, with the model's own error as the guide.

Um & Ye, "Self-guided generation of minority samples using diffusion models", arXiv:2407.11555, in the latent
form with which arXiv:2410.07838 compares itself. At every N-th step, from the guided predictions
x̂0 = x̂0(z_t) and x̂0(z_s) of z_s = √ᾱ_s·x̂0 + √(1−ᾱ_s)·n,

    g = ∇_{z_t} ‖x̂0(z_t) − sg x̂0(z_s)‖²,    z_{t−1} ← z_{t−1} + w·σ_t²·g / max|g|,

where sg stops the gradient: towards images that the model restores badly, which are the rare ones.

Departures. Squared L2 distance in the latent (Eq. 5) instead of LPIPS between images. DDIM here is
deterministic, its σ_t is 0 and would silence the guidance: σ_t² is the variance of DDPM's posterior between
the two noise levels of the step, (1−ᾱ_{t−1})/(1−ᾱ_t)·(1 − ᾱ_t/ᾱ_{t−1}), and no noise is added. max|g| is each
row's own. Settings for text-to-image are not published; w, N and s are those of CelebA with 250 steps. With
fewer steps σ_t² and the pushes are larger, but there are fewer of them.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Generate, Generated, Models, Order
from stages.generate.noise import row_noise
from stages.generate.settings import SamplerSettings
from stages.sampling import Condition, add_noise, condition, denoise, path_of, predict_guided, to_x0
from stages.schedule import Level


def minority_gradient(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    t: float,
    asked: Condition,
    noise_BCHW: Float[Tensor, "B C H W"],
    s: float,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B C H W"]]:
    """‖x̂0(z_t) − x̂0(z_s)‖² of each row, and g. Rows do not mix."""

    schedule = backbone.schedule

    def x0(z_BCHW: Tensor, t: float) -> Tensor:
        output_BCHW = predict_guided(backbone, z_BCHW, t, asked)
        return to_x0(z_BCHW, output_BCHW, schedule.level(t), schedule.prediction)

    with torch.enable_grad():
        z_BCHW = z_BCHW.detach().requires_grad_()
        first_BCHW = x0(z_BCHW, t)
        with torch.no_grad():
            second_BCHW = x0(add_noise(first_BCHW, noise_BCHW, schedule.level(s)), s)
        distance_B = (first_BCHW - second_BCHW).square().sum(dim=(1, 2, 3))
        (gradient_BCHW,) = torch.autograd.grad(distance_B.sum(), z_BCHW)
    return distance_B.detach(), gradient_BCHW


def posterior_variance(start: Level, end: Level) -> float:
    """σ² of DDPM's q(z_end | z_start, x_0) (Ho et al., arXiv:2006.11239, Eq. 7), between noise levels.

    A flow's latent is a diffusion's, with ᾱ = cos² φ, times the scale of its level.
    """
    alpha_from, alpha_to = (math.cos(level.angle) ** 2 for level in (start, end))
    return end.scale**2 * (1 - alpha_to) / (1 - alpha_from) * (1 - alpha_from / alpha_to)


@registry.method("sgms")
class Sgms(Generate):
    """Images of the prompt from seeds, pushed towards what the model restores badly."""

    version = 2

    class Config(SamplerSettings):
        method: Literal["sgms"] = "sgms"
        steps: int = Field(20, ge=1)
        """Sampler steps, as in text_to_image; published with 250."""
        scale: float = Field(0.4, ge=0)
        """w: the largest change of a coordinate in one step, in units of σ_t² (CelebA 0.4, ImageNet 0.2)."""
        every: int = Field(5, ge=1)
        """N: steps 0, N, 2N … are guided (CelebA 5, ImageNet 2)."""
        level: float = Field(0.8, gt=0, lt=1)
        """s as a share of all timesteps, at which x̂0 is noised again (authors' code)."""

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        config, batch = self.config, len(order.z_BCHW)
        path, total = path_of(backbone, self.sampler()), backbone.schedule.total
        levels, s = path.levels, min(max(round(config.level * total), 1), total - 1)
        streams = [chance.own() for chance in order.chances]
        history: list[Tensor] = []

        def correct(k: int, before_BCHW: Tensor, after_BCHW: Tensor) -> Tensor:
            if k % config.every:
                return after_BCHW
            noise_BCHW = row_noise(streams, before_BCHW)
            distance_B, g_BCHW = minority_gradient(backbone, before_BCHW, path.times[k], asked, noise_BCHW, s)
            history.append(distance_B)
            largest_B111 = g_BCHW.abs().amax(dim=(1, 2, 3), keepdim=True)
            size = config.scale * posterior_variance(levels[k], levels[k + 1])
            return after_BCHW + size * g_BCHW / largest_B111.clamp(min=torch.finfo(g_BCHW.dtype).tiny)

        with torch.no_grad():
            asked = condition(backbone, order.prompt, config.guidance, batch)
            z0_BCHW = denoise(backbone, order.z_BCHW, asked, self.sampler(), correct=correct)
            image_B3hw = backbone.decode(z0_BCHW).clamp(-1, 1)
        return Generated(image_B3hw, traces=torch.stack(history, dim=1).tolist())
