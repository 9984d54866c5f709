"""SLERP: a point on the great circle between two seeds.

Shoemake, SIGGRAPH 1985; for diffusion seeds Song et al., arXiv:2010.02502, Appendix D.5. As in NAO's code the
angle is that of the normalised seeds and the weights act on the seeds themselves, so that the norm runs
from one to the other, and nearly parallel seeds (cos > 0.9995) are interpolated linearly.

Departure: opposite seeds have no one great circle between them; they raise instead of giving noise.

Shape letters: K seeds, C H W latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from schemas.records import Combination
from stages import registry
from stages.combine.draw import PairSettings, pair
from stages.contract import Chance, Combine

PARALLEL = 0.9995  # NAO's code
OPPOSITE = -1 + 1e-9  # an angle within 5e-5 of π, where float32 seeds no longer determine a plane


def slerp(z0_CHW: Float[Tensor, "C H W"], z1_CHW: Float[Tensor, "C H W"], t: float) -> Float[Tensor, "C H W"]:
    """[sin((1−t)θ)·z0 + sin(tθ)·z1] / sin θ, in float64."""
    a, b = z0_CHW.double(), z1_CHW.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    if not cosine > OPPOSITE:
        raise ValueError(f"no great circle between two seeds whose cosine is {cosine}")
    if cosine > PARALLEL:
        return torch.lerp(a, b, t).to(z0_CHW.dtype)
    theta = np.arccos(cosine)
    first, second = np.sin((1 - t) * theta) / np.sin(theta), np.sin(t * theta) / np.sin(theta)
    return (float(first) * a + float(second) * b).to(z0_CHW.dtype)


@registry.method("slerp")
class Slerp(Combine):
    """Two distinct seeds, and a point between them drawn uniformly in angle."""

    class Config(PairSettings):
        method: Literal["slerp"] = "slerp"

    def seeds_needed(self) -> int:
        return 2

    def draw(self, chance: Chance, seeds: int) -> Combination:
        return pair(chance, seeds, self.config.t, self.config.points)

    def __call__(
        self, z_KCHW: Float[Tensor, "K C H W"], weights: Sequence[float], artifact: Mapping[str, Tensor]
    ) -> Float[Tensor, "C H W"]:
        return slerp(z_KCHW[0], z_KCHW[1], weights[1])
