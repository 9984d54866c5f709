"""Rectified-flow inversion: the flow from noise to data, followed backwards.

Liu et al., arXiv:2209.03003: z_t = t·data + (1−t)·noise for t from 0 to 1, and the model gives the velocity
dz/dt, which is E[data − noise | z_t]. Sampling follows it upwards, inversion downwards. Euler's step is z +
h·v(z, t). FireFlow (Deng et al., arXiv:2412.07517) has the midpoint rule z + h·v(z + h/2·u, t + h/2), where u
is the velocity at the last midpoint instead of a new one at z: second order for one call a step, and one more
in all.

Departures: FireFlow's code counts t from data (0) to noise (1); here it runs as in the paper of rectified
flow, t = 1 − σ, at the times of the sampler that draws the images.

Shape letters: B batch, C H W latent, h w image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stages import registry
from stages.contract import Backbone, Invert, Inverted, Need, Sampler
from stages.invert.measure import measured
from stages.invert.settings import InvertSettings
from stages.sampling import condition, path_of, predict_guided

Solver = Literal["euler", "midpoint"]


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    z_BCHW: Float[Tensor, "B C H W"],
    times: Sequence[float],
    solver: Solver,
) -> Float[Tensor, "B C H W"]:
    """z at the last of the monotone `times`, from z at the first, one step between two."""
    v_BCHW = None
    for start, end in pairwise(times):
        h = end - start
        if v_BCHW is None or solver == "euler":
            v_BCHW = velocity(z_BCHW, start)
        if solver == "midpoint":
            v_BCHW = velocity(z_BCHW + h / 2 * v_BCHW, start + h / 2)
        z_BCHW = z_BCHW + h * v_BCHW
    return z_BCHW


@registry.method("flow")
class Flow(Invert):
    """Noise of images under a flow-matching backbone, and back by the same solver to measure it."""

    needs: ClassVar[frozenset[Need]] = frozenset({"flow"})

    class Config(InvertSettings):
        method: Literal["flow"] = "flow"
        solver: Solver = "midpoint"
        """euler: first order; midpoint: FireFlow's, second order for one call more in all."""

    def __call__(self, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str) -> Inverted:
        config, sampler = self.config, Sampler(self.config.steps, self.config.guidance)
        asked = condition(backbone, prompt, config.guidance, len(image_B3hw))

        def velocity(z_BCHW: Tensor, t: float) -> Tensor:
            return -predict_guided(backbone, z_BCHW, (1 - t) * backbone.schedule.total, asked)

        up = [1 - level.noise for level in path_of(backbone, sampler).levels]
        with torch.no_grad():
            z0_BCHW = backbone.encode(image_B3hw)
            z_BCHW = integrate(velocity, z0_BCHW, up[::-1], config.solver)
            again_BCHW = integrate(velocity, z_BCHW, up, config.solver)
        calls = (config.steps + (config.solver == "midpoint")) * (1 if config.guidance == 1 else 2)
        return Inverted(z_BCHW, measured(backbone, image_B3hw, z0_BCHW, z_BCHW, again_BCHW, calls))
