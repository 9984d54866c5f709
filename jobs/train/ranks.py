"""Which of the processes that train together this one is, and what they agree on."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed


def agreed(numbers: set[int]) -> set[int]:
    """What any of the processes that train together would leave out."""
    if not _distributed():
        return numbers
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, numbers)
    return set().union(*everywhere)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Of this process among those that train together: as `torch.distributed` or the environment says."""
    if _distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
