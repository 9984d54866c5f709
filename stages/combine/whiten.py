"""Symmetric (Löwdin) whitening of a group of seeds: uncorrelated seeds of norm √d, nearest to the given ones.

Löwdin, J. Chem. Phys. 18, 365 (1950); as whitening, Kessy, Lewin & Strimmer, arXiv:1512.00809 ("ZCA"). With
the rows of Z the K seeds and G = ZZᵀ/d their second moments, Z̃ = G^{-1/2}Z has Z̃Z̃ᵀ/d = I, and of all such
sets it has the smallest ‖Z̃ − Z‖.

What for: combinations of Gaussian seeds take the seeds as independent. Inverted seeds of one class are not
quite: with correlation ρ the sum of K of them, divided by √K, has squared norm d·(1 + (K−1)ρ) instead of d.

Departure from statistics: the moments are about 0 and over the d elements of this one group, because the
seeds are combined about 0 and it is their own inner products that inflate the norm.

Shape letters: *B any batch, K seeds, C H W latent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stages.combine.latents import dimensions, group_double

DEPENDENT = 1e-12  # of the largest eigenvalue: below, a direction is the rounding of float32 seeds


def whiten(z: Float[Tensor, "*B K C H W"]) -> Float[Tensor, "*B K C H W"]:
    """G^{-1/2}·z with G = ZZᵀ/d, in float64."""
    seeds, _ = group_double(z, None)
    flat = seeds.flatten(-3)
    gram = flat @ flat.mT / dimensions(z)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    if not bool((eigenvalues[..., 0] > DEPENDENT * eigenvalues[..., -1]).all()):
        raise ValueError(
            f"{z.shape[-4]} seeds of {dimensions(z)} elements that are linearly dependent cannot be made"
            " uncorrelated; leave out the one that repeats the others"
        )
    inverse_root = (vectors * eigenvalues.rsqrt()[..., None, :]) @ vectors.mT
    return (inverse_root @ flat).unflatten(-1, z.shape[-3:]).to(z.dtype)
