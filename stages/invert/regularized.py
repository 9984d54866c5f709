"""Regularised DDIM inversion: in every step the predicted noise is made more like noise.

Parmar et al. (pix2pix-zero), arXiv:2302.03027, §3.1, with the constants of the authors' code: gradient steps
of the predicted ε on L_pair, the squared autocorrelations of each channel, summed over a pyramid of 2 × 2
averages down to 8 × 8, and on L_KL = σ² + μ² − 1 − ln σ² of all entries. Seeds become more typical, and the
sampler no longer draws the image from them: ε was changed, but the model was not.

Departures: the code draws one shift of each level at random, five times an iteration; here the mean over all
shifts is taken, so that an image has one seed. The shift of 0, which the code may draw, is left out: it is
the variance, L_KL's own. Gradients of means go with 1/entries, so the same constants do 16 times as much to a
16 × 16 latent as to Stable Diffusion's.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Invert, Inverted, Need, Sampler
from stages.invert.measure import measured
from stages.invert.settings import InvertSettings
from stages.sampling import condition, ddim_step, denoise, path_of, predict_guided, to_epsilon

SMALLEST = 8  # side of the last level of the pyramid


def pair_loss(epsilon_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Squared autocorrelations, summed over channels, levels and both axes, and averaged over shifts."""
    loss_B = epsilon_BCHW.new_zeros(len(epsilon_BCHW))
    while True:
        side = epsilon_BCHW.shape[2]
        for axis in (2, 3):
            for shift in range(1, side // 2):
                product_BCHW = epsilon_BCHW * epsilon_BCHW.roll(shift, axis)
                loss_B = loss_B + product_BCHW.mean(dim=(2, 3)).square().sum(dim=1) / (side // 2 - 1)
        if side <= SMALLEST:
            return loss_B
        epsilon_BCHW = F.avg_pool2d(epsilon_BCHW, 2)


def kl_loss(epsilon_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Twice the divergence of N(μ, σ²) from N(0, 1)."""
    variance_B, mean_B = torch.var_mean(epsilon_BCHW, dim=(1, 2, 3))
    return variance_B + mean_B.square() - 1 - torch.log(variance_B + 1e-7)


def regularize(
    epsilon_BCHW: Float[Tensor, "B C H W"], autocorrelation: float, kl: float, iterations: int
) -> Float[Tensor, "B C H W"]:
    """ε after alternating gradient steps on both losses. Rows do not mix."""
    for _ in range(iterations):
        for loss, weight in ((pair_loss, autocorrelation), (kl_loss, kl)):
            with torch.enable_grad():
                leaf_BCHW = epsilon_BCHW.detach().requires_grad_()
                (gradient_BCHW,) = torch.autograd.grad(loss(leaf_BCHW).sum(), leaf_BCHW)
            epsilon_BCHW = epsilon_BCHW - weight * gradient_BCHW
    return epsilon_BCHW


def invert_regularized(
    backbone: Backbone,
    z0_BCHW: Float[Tensor, "B C H W"],
    prompt: str,
    sampler: Sampler,
    autocorrelation: float,
    kl: float,
    iterations: int,
) -> Float[Tensor, "B C H W"]:
    """The steps of `stages.invert.ddim`, each with its ε regularised."""
    path, prediction = path_of(backbone, sampler), backbone.schedule.prediction
    asked = condition(backbone, prompt, sampler.guidance, len(z0_BCHW))
    z_BCHW = z0_BCHW
    for k in reversed(range(sampler.steps)):
        output_BCHW = predict_guided(backbone, z_BCHW, path.times[k], asked)
        epsilon_BCHW = to_epsilon(z_BCHW, output_BCHW, path.levels[k], prediction)
        epsilon_BCHW = regularize(epsilon_BCHW, autocorrelation, kl, iterations)
        z_BCHW = ddim_step(z_BCHW, epsilon_BCHW, path.levels[k + 1], path.levels[k], "epsilon")
    return z_BCHW


@registry.method("regularized")
class RegularizedInversion(Invert):
    """DDIM inversion with every ε regularised."""

    needs: ClassVar[frozenset[Need]] = frozenset({"diffusion"})

    class Config(InvertSettings):
        method: Literal["regularized"] = "regularized"
        autocorrelation: float = Field(20.0, ge=0)
        """Step size λ_auto on the autocorrelations; 20 in pix2pix-zero's code."""
        kl: float = Field(20.0, ge=0)
        """Step size λ_KL on mean and variance; 20 in pix2pix-zero's code."""
        iterations: int = Field(5, ge=1)
        """Gradient steps on each, in every step of the inversion; 5 in pix2pix-zero's code."""

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        config = self.config
        sampler = Sampler(config.steps, config.guidance)
        with torch.no_grad():
            z0_BCHW = backbone.encode(image_B3hw)
            z_BCHW = invert_regularized(
                backbone, z0_BCHW, prompt, sampler, config.autocorrelation, config.kl, config.iterations
            )
            again_BCHW = denoise(backbone, z_BCHW, prompt, sampler)
        calls = sampler.steps * (1 if sampler.guidance == 1 else 2)
        return Inverted(z_BCHW, measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls))
