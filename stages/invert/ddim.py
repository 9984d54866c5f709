"""DDIM inversion: from an image to the seed from which the sampler draws it.

Song et al., arXiv:2010.02502, §4.3; settings of NAO (Samuel et al., NeurIPS 2023): 50 steps, guidance 1.

The sampling step from ᾱ_high to ᾱ_low, solved for its starting point, needs ε at the point it looks for.
As in prompt-to-prompt (Hertz et al., arXiv:2208.01626) ε is taken at the known point but at the timestep of
the destination, ε(z_low, t_high): the same timesteps are then visited as in sampling, and the first call is
not made at t = 0, which no sampler visits. A v-model is read as the ε-model that it stands for at that
timestep, so both kinds of one denoiser give one seed.

Departures: ᾱ before the first step is the schedule's own `final_alpha_cumprod`, not always ᾱ_0; the image is
the VAE's posterior mean, not a sample, so that an image has one seed.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Invert, Inverted, Sampler
from stages.gaussianity import gaussianity
from stages.sampling import alphas, ddim_step, denoise, predict_guided, timesteps, to_epsilon


def invert_ddim(
    backbone: Backbone, z0_BCHW: Float[Tensor, "B C H W"], prompt: str, sampler: Sampler
) -> Float[Tensor, "B C H W"]:
    """The sampler's steps walked backwards, each with ε frozen at the point it starts from."""
    path = timesteps(backbone, sampler.steps)
    levels = alphas(backbone, path)
    z_BCHW = z0_BCHW
    for k in reversed(range(sampler.steps)):
        output_BCHW = predict_guided(backbone, z_BCHW, path[k], prompt, sampler.guidance)
        epsilon_BCHW = to_epsilon(z_BCHW, output_BCHW, levels[k], backbone.prediction_type)
        z_BCHW = ddim_step(z_BCHW, epsilon_BCHW, levels[k + 1], levels[k], "epsilon")
    return z_BCHW


def psnr(image_B3hw: Float[Tensor, "B 3 h w"], other_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB, with pixels on [0, 1]; at most 100."""
    difference_B3hw = (image_B3hw.clamp(-1, 1) - other_B3hw.clamp(-1, 1)).double() / 2
    return -10 * difference_B3hw.square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


@registry.method("ddim")
class DdimInversion(Invert):
    """Image → latent → seed, and back again to measure what was lost on the way."""

    class Config(Settings):
        method: Literal["ddim"] = "ddim"
        steps: int = Field(50, ge=1)
        """DDIM steps; 50 in NAO's code, 400 in COG's experiments."""
        guidance: float = Field(1.0, ge=0)
        """Scale of classifier-free guidance. 1 (none) in NAO and COG: guidance makes inversion diverge."""

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        sampler = Sampler(self.config.steps, self.config.guidance)
        with torch.no_grad():
            z_BCHW = invert_ddim(backbone, backbone.encode(image_B3hw), prompt, sampler)
            again_B3hw = backbone.decode(denoise(backbone, z_BCHW, prompt, sampler))
            fidelity_B = psnr(image_B3hw, again_B3hw)
        measures = gaussianity(z_BCHW)
        for measure, fidelity in zip(measures, fidelity_B.tolist(), strict=True):
            measure["psnr"] = fidelity
        return Inverted(z_BCHW, measures)
