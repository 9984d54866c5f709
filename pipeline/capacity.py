"""What there is room for: how many workers fit on the nodes of a cluster, and what each takes of one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Run
from schemas.errors import UserError


@dataclass(frozen=True)
class Share:
    """What one worker takes of a node."""

    gpus: float
    cpus: float

    def places(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many workers fit on nodes with these resources. A worker is on one node, a share on one GPU."""
        return sum(self._places(node.get("GPU", 0.0), node.get("CPU", 0.0)) for node in nodes)

    def _places(self, gpus: float, cpus: float) -> int:
        if not self.gpus:
            return _whole(cpus / self.cpus)
        return int(gpus) * _whole(1 / self.gpus) if self.gpus < 1 else int(gpus / self.gpus)


def _whole(number: float) -> int:
    return math.floor(number + 1e-6)  # 1 / (1 / 3) is 3


def matching(nodes: Iterable[Mapping[str, Any]], labels: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The resources of the living nodes that have one of these labels under each key."""
    return [
        node["Resources"]
        for node in nodes
        if node["Alive"] and all(node["Labels"].get(key) in _several(value) for key, value in labels.items())
    ]


def _several(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def share_of(run: Run, nodes: Sequence[Mapping[str, float]]) -> Share:
    """What each worker takes of nodes with these resources. Raises `UserError`."""
    share = run.gpus_per_worker
    if share > 1 and share % 1:
        raise UserError(
            f"run.gpus_per_worker: {share:g} given; allowed are a share of one GPU, or a whole number"
        )
    most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    if 0 < most < share:
        raise UserError(
            f"run.gpus_per_worker: {share:g} given; allowed are a share of one GPU, or a whole number up"
            f" to the {most:g} that a node has"
        )
    if most or run.device == "gpu":
        return Share(share, 0)  # a GPU worker must not wait for a CPU
    # CPU workers share what there is, where there are to be more of them than fit
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0) or 1.0
    cpus = min(float(run.threads_per_worker), largest)
    divisor = 1
    while run.workers != "auto" and nodes and Share(0, cpus / divisor).places(nodes) < run.workers:
        divisor += 1
    return Share(0, math.floor(cpus / divisor * 1e4) / 1e4)  # as fine as Ray counts
