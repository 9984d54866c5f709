"""O-BELM: inversion by a two-step formula that is its own inverse.

Wang et al., "BELM: Bidirectional explicit linear multi-step sampler", NeurIPS 2024, arXiv:2410.07273. Three
neighbouring states of a path obey one linear relation with the derivative at the middle one, so that either
end follows explicitly from the other two. With steps h_above and h_below around s_i and r = h_below/h_above,
O-BELM is the relation of least local error:

    x_below = r²·x_above + (1 − r²)·x_i − h_below·(1 + r)·x'(s_i)

Solved for x_above it inverts that sampler (`denoise_belm`) exactly, from two neighbouring states. z_{T−1}
cannot be had from z_T: a DDIM step from z_T is close to it, but not it, and the formula amplifies the
difference until the picture is another. Who draws with this sampler keeps both states. Here images are drawn
by DDIM, which starts from z_T alone: z_{T−1} is not kept, `psnr` and `latent_mse` are what DDIM draws from
the seed, and `belm_mse` is the error under the sampler of the paper, from both states.

Departure: in the paper s = √((1−ᾱ)/ᾱ), x = z/√ᾱ and x' = ε; here s is the angle φ with cos φ = √ᾱ, x = z (of
a flow, z as a diffusion's) and x' = v (`stages.invert.rotation`). The paper's s is infinite where a schedule
begins in pure noise, and grows towards it in ever larger steps: inversion multiplies what the first step did
wrong by (h_above/h_below)² again and again, and from such seeds DDIM draws other pictures. In φ the steps are
nearly even.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Invert, Inverted, Sampler
from stages.invert.measure import measured
from stages.invert.rotation import path_of, step_back, velocity
from stages.invert.settings import InvertSettings
from stages.sampling import denoise


def invert_belm(
    backbone: Backbone, z0_BCHW: Float[Tensor, "B C H W"], prompt: str, sampler: Sampler
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """z_T and z_{T−1}, in float64, which is what makes the way back exact. The first step is DDIM's."""
    path = path_of(backbone, sampler)
    levels, angles = path.levels, [level.angle for level in path.levels]
    below_BCHW = z0_BCHW.double() / levels[-1].scale
    at_start_BCHW = levels[-2].scale * below_BCHW
    v_BCHW = velocity(backbone, at_start_BCHW, path.times[-1], levels[-2], prompt, sampler.guidance)
    y_BCHW = step_back(below_BCHW, v_BCHW, levels[-1], levels[-2])
    for k in reversed(range(1, len(path.times))):
        h_below, h_above = angles[k] - angles[k + 1], angles[k - 1] - angles[k]
        r, z_BCHW = h_above / h_below, levels[k].scale * y_BCHW
        v_BCHW = velocity(backbone, z_BCHW, path.times[k], levels[k], prompt, sampler.guidance)
        above_BCHW = r**2 * below_BCHW + (1 - r**2) * y_BCHW + h_above * (1 + r) * v_BCHW
        below_BCHW, y_BCHW = y_BCHW, above_BCHW
    return levels[0].scale * y_BCHW, levels[1].scale * below_BCHW


def denoise_belm(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    second_BCHW: Float[Tensor, "B C H W"],
    prompt: str,
    sampler: Sampler,
) -> Float[Tensor, "B C H W"]:
    """z_0 from z_T and z_{T−1}, in float64."""
    path = path_of(backbone, sampler)
    levels, angles = path.levels, [level.angle for level in path.levels]
    above_BCHW, y_BCHW = z_BCHW.double() / levels[0].scale, second_BCHW.double() / levels[1].scale
    for k in range(1, len(path.times)):
        h_below, h_above = angles[k] - angles[k + 1], angles[k - 1] - angles[k]
        r, at_BCHW = h_below / h_above, levels[k].scale * y_BCHW
        v_BCHW = velocity(backbone, at_BCHW, path.times[k], levels[k], prompt, sampler.guidance)
        below_BCHW = r**2 * above_BCHW + (1 - r**2) * y_BCHW - h_below * (1 + r) * v_BCHW
        above_BCHW, y_BCHW = y_BCHW, below_BCHW
    return levels[-1].scale * y_BCHW


@registry.method("belm")
class Belm(Invert):
    """Seeds of a second-order path, for one model call a step."""

    version = 2

    class Config(InvertSettings):
        method: Literal["belm"] = "belm"

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        sampler = Sampler(self.config.steps, self.config.guidance)
        with torch.no_grad():
            z0_BCHW = backbone.encode(image_B3hw)
            states = invert_belm(backbone, z0_BCHW, prompt, sampler)
            z_BCHW = states[0].to(z0_BCHW.dtype)
            again_BCHW = denoise(backbone, z_BCHW, prompt, sampler)
            own_BCHW = denoise_belm(backbone, *states, prompt, sampler)
        calls = len(path_of(backbone, sampler).times) * (1 if sampler.guidance == 1 else 2)
        measures = measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls)
        own_B = (own_BCHW - z0_BCHW).square().mean(dim=(1, 2, 3))
        rows = zip(measures, own_B.tolist(), strict=True)
        return Inverted(z_BCHW, [{**measure, "belm_mse": own} for measure, own in rows])
