"""DDIM inversion: from an image to the seed from which the sampler draws it.

Song et al., arXiv:2010.02502, §4.3; settings of NAO (Samuel et al., NeurIPS 2023): 50 steps, guidance 1.

The sampling step from ᾱ_high to ᾱ_low, solved for its starting point, needs ε at the point it looks for.
As in prompt-to-prompt (Hertz et al., arXiv:2208.01626) ε is taken at the known point but at the timestep of
the destination, ε(z_low, t_high): the same timesteps are then visited as in sampling, and the first call is
not made at t = 0, which no sampler visits. A v-model is read as the ε-model that it stands for at that
timestep, so both kinds of one denoiser give one seed.

Departures: ᾱ before the first step is the one that the schedule ends at, not always ᾱ_0; the image is
the VAE's posterior mean, not a sample, so that an image has one seed.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Invert, Inverted, Need, Sampler
from stages.invert.measure import measured
from stages.invert.settings import InvertSettings
from stages.sampling import condition, ddim_step, denoise, path_of, predict_guided, to_epsilon


def invert_ddim(
    backbone: Backbone, z0_BCHW: Float[Tensor, "B C H W"], prompt: str, sampler: Sampler
) -> Float[Tensor, "B C H W"]:
    """The sampler's steps walked backwards, each with ε frozen at the point it starts from."""
    path, prediction = path_of(backbone, sampler), backbone.schedule.prediction
    asked = condition(backbone, prompt, sampler.guidance, len(z0_BCHW))
    z_BCHW = z0_BCHW
    for k in reversed(range(sampler.steps)):
        output_BCHW = predict_guided(backbone, z_BCHW, path.times[k], asked)
        epsilon_BCHW = to_epsilon(z_BCHW, output_BCHW, path.levels[k], prediction)
        z_BCHW = ddim_step(z_BCHW, epsilon_BCHW, path.levels[k + 1], path.levels[k], "epsilon")
    return z_BCHW


@registry.method("ddim")
class DdimInversion(Invert):
    """Image → latent → seed, and back again to measure what was lost on the way."""

    needs: ClassVar[frozenset[Need]] = frozenset({"diffusion"})

    class Config(InvertSettings):
        method: Literal["ddim"] = "ddim"

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        sampler = Sampler(self.config.steps, self.config.guidance)
        with torch.no_grad():
            z0_BCHW = backbone.encode(image_B3hw)
            z_BCHW = invert_ddim(backbone, z0_BCHW, prompt, sampler)
            again_BCHW = denoise(backbone, z_BCHW, prompt, sampler)
        calls = sampler.steps * (1 if sampler.guidance == 1 else 2)
        return Inverted(z_BCHW, measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls))
