"""Views: what a scorer is shown of a picture, so that it cannot be pleased by what only it sees.

An image that is moved along a scorer's gradient may come to please that scorer and nobody else. A pattern
that does so seldom survives crops, mirroring and noise, while a picture of a thing stays one. The first view
is the picture itself; each further one is a crop of it, mirrored half of the time, at the picture's own size.
With `noise`, every view has Gaussian noise of its own. The noise is in the image and not in the seed: what is
to be drowned are pixels, and another seed would be another picture.

A crop is linear and separable, so it is two matrix products: its gradient is repeatable on every device.

Shape letters: B batch, h w image, S its size (h = w = S).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SIDE = (0.8, 1.0)  # of a crop, as a share of the picture's


@dataclass(frozen=True)
class View:
    """One view of each row. None: not cropped, no noise."""

    rows_BSS: Float[Tensor, "B S S"] | None = None
    columns_BSS: Float[Tensor, "B S S"] | None = None
    noise_B3SS: Float[Tensor, "B 3 S S"] | None = None

    def __call__(self, image_B3SS: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        if self.rows_BSS is not None and self.columns_BSS is not None:
            image_B3SS = self.rows_BSS[:, None] @ image_B3SS @ self.columns_BSS[:, None].mT
        return image_B3SS if self.noise_B3SS is None else image_B3SS + self.noise_B3SS

    def of(self, rows: slice) -> View:
        """The view of some of the rows."""
        parts = (self.rows_BSS, self.columns_BSS, self.noise_B3SS)
        return View(*(None if part is None else part[rows] for part in parts))


ITSELF = (View(),)


def draw_views(
    streams: Sequence[np.random.Generator], views: int, noise: float, size: int, like: Tensor
) -> tuple[View, ...]:
    """The next views of each row, from its own stream alone, on the device and in the precision of `like`."""
    drawn = []
    for number in range(views):
        rows_BSS = columns_BSS = noise_B3SS = None
        if number > 0:
            chance_B4 = np.stack([stream.uniform(size=4) for stream in streams])
            side_B, top_B, left_B, mirrored_B = torch.from_numpy(chance_B4).T
            length_B = size * (SIDE[0] + (SIDE[1] - SIDE[0]) * side_B)
            rows_BSS = crop(top_B * (size - length_B), length_B, size)
            columns_BSS = crop(left_B * (size - length_B), length_B, size)
            flipped_BSS = columns_BSS.flip(1)
            columns_BSS = torch.where(mirrored_B[:, None, None] < 0.5, flipped_BSS, columns_BSS)
            rows_BSS, columns_BSS = rows_BSS.to(like), columns_BSS.to(like)
        if noise > 0:
            noise_NP = np.stack([stream.standard_normal((3, size, size), np.float32) for stream in streams])
            noise_B3SS = (noise * torch.from_numpy(noise_NP)).to(like)
        drawn.append(View(rows_BSS, columns_BSS, noise_B3SS))
    return tuple(drawn)


def crop(
    start_B: Float[Tensor, " B"], length_B: Float[Tensor, " B"], size: int
) -> Float[Tensor, "B {size} {size}"]:
    """Matrices that resample `length` pixels from `start` on to `size` pixels, bilinear, edges repeated."""
    pixel_S = torch.arange(size, dtype=torch.float64)
    seen_BS = start_B[:, None] + (pixel_S + 0.5) * (length_B / size)[:, None] - 0.5
    return (1 - (seen_BS.clamp(0, size - 1)[:, :, None] - pixel_S).abs()).clamp(min=0)
