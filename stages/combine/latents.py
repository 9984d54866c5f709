"""What every combination does with its latents: check their shapes, go to float64, measure and set norms.

Shape letters: *B any batch, K seeds, C H W latent (d = C·H·W).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LATENT = (-3, -2, -1)


def pair_double(
    z0: Float[Tensor, "*B C H W"], z1: Float[Tensor, "*B C H W"], t: float | Float[Tensor, "*B"]
) -> tuple[Float[Tensor, "*B C H W"], Float[Tensor, "*B C H W"], Float[Tensor, "*B 1 1 1"]]:
    """Two seeds and the place between them, in float64."""
    if z0.ndim < 3 or z0.shape != z1.shape:
        raise ValueError(
            f"two seeds must have one shape (..., C, H, W), given {tuple(z0.shape)} and {tuple(z1.shape)}"
        )
    batch = z0.shape[:-3]
    t_B = torch.as_tensor(t, dtype=torch.float64, device=z0.device)
    if t_B.ndim > 0 and t_B.shape != batch:
        raise ValueError(
            f"t must be a number or have the batch's shape {tuple(batch)}, given {tuple(t_B.shape)}"
        )
    return z0.double(), z1.double(), t_B.expand(batch)[..., None, None, None]


def group_double(
    z: Float[Tensor, "*B K C H W"], w: Float[Tensor, "*B K"] | None
) -> tuple[Float[Tensor, "*B K C H W"], Float[Tensor, "*B K"]]:
    """A group of seeds and its weights, which then sum to 1, in float64. None: equal weights."""
    if z.ndim < 4 or z.shape[-4] == 0:
        raise ValueError(f"a group of seeds must have shape (..., K, C, H, W), given {tuple(z.shape)}")
    if w is None:
        w = torch.ones(z.shape[:-3], dtype=torch.float64, device=z.device)
    if w.shape != z.shape[:-3]:
        raise ValueError(f"weights must have shape {tuple(z.shape[:-3])}, one a seed, given {tuple(w.shape)}")
    w = w.double()
    total = w.sum(dim=-1, keepdim=True)
    if not bool(((w >= 0) & (total > 0) & total.isfinite()).all()):
        raise ValueError("the weights of a centroid must be finite, at least 0, and not all 0")
    return z.double(), w / total


def dimensions(z: Float[Tensor, "*B C H W"]) -> int:
    """d, the length of a latent as a vector; typical noise has norm √d."""
    return math.prod(z.shape[-3:])


def norms(z: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B 1 1 1"]:
    return torch.linalg.vector_norm(z, dim=LATENT, keepdim=True)


def to_norm(z: Float[Tensor, "*B C H W"], norm: float) -> Float[Tensor, "*B C H W"]:
    """The same direction at another norm."""
    length = norms(z)
    if not bool((length > 0).all()):
        raise ValueError("a latent of norm 0 has no direction that could be kept")
    return z * (norm / length)


def weighted_sum(z: Float[Tensor, "*#B K C H W"], w: Float[Tensor, "*#B K"]) -> Float[Tensor, "*B C H W"]:
    """Σ w_k z_k."""
    return torch.einsum("...k,...kchw->...chw", w, z)
