"""Noise of the rows of a batch, each from its own stream.

Shape letters: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def row_noise(streams: Sequence[np.random.Generator], like_B: Tensor) -> Tensor:
    """N(0, I) in the shape, precision and place of `like_B`; row r is the next draw of stream r."""
    rows = [stream.standard_normal(like_B.shape[1:], dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(rows)).to(like_B)
