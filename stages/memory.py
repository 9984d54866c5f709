"""What a forward pass keeps for its gradient: activations while they fit, recomputation where they do not.

A gradient needs what every step of the forward pass saved. A step that keeps nothing is run again when its
turn comes in the backward pass (Chen et al., arXiv:1604.06174): the memory of one step for a third more work.
Either way the same kernels see the same numbers, so a gradient has the same bits whatever was kept, and the
budget may be what this machine has to spare.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# Of the memory that is free. The rest is for what a step needs while it runs, for fragments, and for another
# worker on the same device that looks at the same moment.
SHARE = 0.4


class Memory:
    """How many bytes of activations the steps of a forward pass may keep for the backward pass."""

    def __init__(self, budget: float):
        self.budget = budget
        self.kept = 0  # bytes, by the steps since `begin`
        self._sizes: dict[Any, int] = {}

    @classmethod
    def spare(cls, device: torch.device) -> Memory:
        """A share of what the device has free; of a CPU's, the part of one worker, by its threads."""
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            free, total = torch.cuda.mem_get_info(index)
            used, limit = (
                torch.cuda.memory_allocated(index),
                torch.cuda.get_per_process_memory_fraction(index),
            )
            there = min(free + torch.cuda.memory_reserved(index), limit * total) - used
            return cls(max(0, int(SHARE * there)))
        workers = max(1, (os.cpu_count() or 1) / torch.get_num_threads())
        return cls(int(SHARE * _available() / workers))

    def begin(self) -> None:
        """A new forward pass: the backward pass of the last one has freed what that one kept."""
        self.kept = 0

    def run(self, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args), which must give the same each time. Its activations are kept if the budget has room.

        Steps of one name with arguments of the same shapes are taken to save the same. The first of them
        tells how much: it is run with everything kept, and once more where that is too much.
        """
        if self.budget == math.inf or not torch.is_grad_enabled():
            return step(*args)
        if self.budget > 0:
            kind = (getattr(step, "__qualname__", type(step)), *map(_kind, args))
            if kind not in self._sizes:
                made, self._sizes[kind] = measured(step, *args)
                if self._keep(self._sizes[kind]):
                    return made
                del made
            elif self._keep(self._sizes[kind]):
                return step(*args)
        return checkpoint(step, *args, use_reentrant=False)

    def _keep(self, size: int) -> bool:
        """Whether the budget has room for a step, beside the largest one that may be run again."""
        room = self.kept + size + max(self._sizes.values()) <= self.budget
        self.kept += size if room else 0
        return room


NOTHING = Memory(0)  # every step is run again
EVERYTHING = Memory(math.inf)


def measured(step: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """step(*args), and the bytes that it saves for its gradient: each storage once, parameters not at all."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that held its own graph would never be freed

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = step(*args)
    return made, sum(sizes.values())


def _kind(given: Any) -> Any:
    if isinstance(given, Tensor):
        return (given.shape, given.dtype, given.requires_grad)
    return type(given)


def _available() -> int:
    """Bytes that a process could have: what the system says, within what a container allows."""
    try:
        said = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        available = int(said[1]) * 1024 if said else 0
    except OSError:  # no Linux: of all memory a part that is likely to be free
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    try:
        return min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such container, or "max"
        return available
