"""What is recorded of every inversion: how well it reconstructs, what it cost, how typical its seed is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stages.contract import Backbone
from stages.gaussianity import gaussianity


def measured(
    backbone: Backbone,
    image_B3hw: Float[Tensor, "B 3 h w"],
    z0_BCHW: Float[Tensor, "B C H W"],
    z_BCHW: Float[Tensor, "B C H W"],
    again_BCHW: Float[Tensor, "B C H W"],
    calls: int | Sequence[int],
) -> list[dict[str, float]]:
    """Measures of each row: its image, its latent z_0, its seed, and the latent that the seed is drawn to.

    `calls` is how often a row went through the model to be inverted, guidance counted twice: one number for
    all, or one for each.
    """
    calls_B = [calls] * len(z_BCHW) if isinstance(calls, int) else calls
    with torch.no_grad():
        fidelity_B = psnr(image_B3hw, backbone.decode(again_BCHW))
        error_B = (again_BCHW - z0_BCHW).double().square().mean(dim=(1, 2, 3))
    return [
        {**measures, "psnr": fidelity, "latent_mse": error, "calls": float(asked)}
        for measures, fidelity, error, asked in zip(
            gaussianity(z_BCHW), fidelity_B.tolist(), error_B.tolist(), calls_B, strict=True
        )
    ]


def psnr(image_B3hw: Float[Tensor, "B 3 h w"], other_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB, with pixels on [0, 1]; at most 100."""
    difference_B3hw = (image_B3hw.clamp(-1, 1) - other_B3hw.clamp(-1, 1)).double() / 2
    return -10 * difference_B3hw.square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
