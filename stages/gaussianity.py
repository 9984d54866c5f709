"""How Gaussian a latent looks: what is recorded of every seed.

For z ~ N(0, I) in d dimensions: norm/√d → 1, mean → 0, variance → 1, lag-1 autocorrelation → 0 and excess
kurtosis → 0, with standard deviations of about 1/√(2d), 1/√d, √(2/d), 1/√(2d) and √(24/d).

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gaussianity(z_BCHW: Float[Tensor, "B C H W"]) -> list[dict[str, float]]:
    """Measures of each latent, in float64.

    The autocorrelation is that of neighbours in a row and of neighbours in a column, averaged: the mean
    product of two neighbours' deviations from the latent's mean, over its variance.
    """
    with torch.no_grad():
        return [_measure(z_CHW.double()) for z_CHW in z_BCHW]


def _measure(z_CHW: Tensor) -> dict[str, float]:
    mean = z_CHW.mean()
    deviation_CHW = z_CHW - mean
    variance = deviation_CHW.square().mean()
    across = (deviation_CHW[:, :, 1:] * deviation_CHW[:, :, :-1]).mean()
    down = (deviation_CHW[:, 1:] * deviation_CHW[:, :-1]).mean()
    return {
        "norm_ratio": float(z_CHW.norm() / z_CHW.numel() ** 0.5),
        "mean": float(mean),
        "variance": float(variance),
        "autocorrelation": float((across + down) / 2 / variance),
        "kurtosis": float(deviation_CHW.pow(4).mean() / variance**2 - 3),
    }
