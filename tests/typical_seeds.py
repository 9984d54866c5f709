"""Seeds in few and many dimensions, and pairs of given norms and angle, for the tests of NAO."""

from __future__ import annotations

import math

import torch

SHAPES = {4: (1, 2, 2), 64: (4, 4, 4), 1024: (4, 16, 16), 16384: (4, 64, 64)}


def seeds(count, d=64, rng_seed=0):
    rng = torch.Generator().manual_seed(rng_seed)
    return torch.randn(count, *SHAPES[d], dtype=torch.float64, generator=rng)


def at_angle(d, r0, r1, theta, rng_seed=0):
    """Two seeds of given norms and angle, in a random plane."""
    a, b = torch.linalg.qr(seeds(2, d, rng_seed).flatten(1).T).Q.T.reshape(2, *SHAPES[d])
    return r0 * a, r1 * (math.cos(theta) * a + math.sin(theta) * b)
