"""Differentiable resizing of image tensors, repeatable on every device.

Antialiased bicubic resampling is linear and separable, so it is two matrix products. CUDA's own kernel for
its gradient adds in no fixed order; a matrix product does not.

Shape letters: B batch, h w image, S size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=64)
def _resampling(before: int, after: int) -> Tensor:
    """The (after, before) matrix of torch's antialiased bicubic resampling of a line of pixels."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(before, dtype=torch.float64)[None, None]
        return F.interpolate(identity, size=(after, before), mode="bicubic", antialias=True)[0, 0]


def resize_crop(image_B3hw: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B 3 {size} {size}"]:
    """Short side to `size`, then the centre square, as CLIP's and timm's evaluation transforms do."""
    height, width = image_B3hw.shape[2:]
    if (height, width) == (size, size):
        return image_B3hw
    short = min(height, width)
    rows_Sh, columns_Sw = (
        _centre(_resampling(side, size * side // short), size).to(image_B3hw) for side in (height, width)
    )
    return rows_Sh @ image_B3hw @ columns_Sw.T


def _centre(matrix: Tensor, size: int) -> Tensor:
    start = round((len(matrix) - size) / 2)
    return matrix[start : start + size]


class Preprocessing:
    """Image tensors in [-1, 1], of any size, as a network wants them: `resize_crop`, then normalised.

    The whole of a square image is seen, whatever extra crop the network's own evaluation makes. `mean` and
    `std` are of pixels on [0, 1]. The images may come from another device.
    """

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], device: torch.device):
        self.size = size
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std)
        )

    def __call__(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 s s"]:
        pixels_B3ss = (resize_crop(image_B3hw.to(self._mean.device), self.size) + 1) / 2
        return (pixels_B3ss - self._mean) / self._std
