"""What happens to pictures before CLIP, classifier and judge see them in training.

Blur, noise, a soft warp, other brightness and lost resolution: what decoders, encoders and samplers do to a
picture. A model that has met them is not fooled by noise and does not need a perfect drawing.
Shape letters: B batch, C channels, H W pixels; values -1..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def degrade(x_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture turned, and with its own mixture of faults; one in five otherwise left whole."""
    batch = len(x_BCHW)
    turn = int(torch.randint(4, (), generator=generator))
    x = torch.rot90(x_BCHW, turn, (2, 3))
    x = _warp(x, generator)
    x = _blend(x, _blur(x), _strength(batch, generator))
    x = _blend(x, _lower_resolution(x, generator), _strength(batch, generator))
    light = 1 + 0.2 * torch.randn(batch, 1, 1, 1, generator=generator)
    tint = 0.1 * torch.randn(batch, 3, 1, 1, generator=generator)
    x = x * light.clamp(0.5, 1.5) + tint
    noise = 0.2 * torch.rand(batch, 1, 1, 1, generator=generator) ** 2
    x = x + noise * torch.randn(x.shape, generator=generator)
    untouched = torch.rand(batch, 1, 1, 1, generator=generator) < 0.2
    return torch.where(untouched, torch.rot90(x_BCHW, turn, (2, 3)), x.clamp(-1, 1))


def mixed_up(
    x_BCHW: torch.Tensor, target_BK: torch.Tensor, generator: torch.Generator, share: float = 0.25
) -> tuple[torch.Tensor, torch.Tensor]:
    """A share of the batch laid over another picture, with targets to match (mixup, Zhang et al. 2018).

    A ghost of two shapes must get a divided verdict, not a sure one.
    """
    batch = len(x_BCHW)
    other = torch.randperm(batch, generator=generator)
    weight = 0.5 + 0.5 * torch.rand(batch, generator=generator)
    weight = torch.where(torch.rand(batch, generator=generator) < share, weight, torch.ones(batch))
    w = weight.view(-1, 1, 1, 1)
    mixed_target = weight[:, None] * target_BK + (1 - weight[:, None]) * target_BK[other]
    return w * x_BCHW + (1 - w) * x_BCHW[other], mixed_target


def _strength(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Zero for half of the pictures, uniform in 0..1 for the others: (B, 1, 1, 1)."""
    u = torch.rand(batch, 1, 1, 1, generator=generator)
    return (2 * u - 1).clamp(min=0)


def _blend(x: torch.Tensor, y: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return x + strength * (y - x)


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Binomial blur, sigma about 1.4 pixels."""
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x


def _lower_resolution(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Down to 28..48 pixels and up again."""
    size = int(torch.randint(28, 49, (), generator=generator))
    small = F.interpolate(x, size=(size, size), mode="area")
    return F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _warp(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A smooth displacement field of about one pixel, a new one for each picture."""
    batch, _, height, width = x.shape
    strength = 1.2 * torch.rand(batch, 1, 1, 1, generator=generator) * 2 / width
    coarse = torch.randn(batch, 2, 6, 6, generator=generator) * strength
    flow = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    still = F.affine_grid(torch.eye(2, 3).repeat(batch, 1, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + flow.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
