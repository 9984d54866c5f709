"""The records that pass between stages and pipeline. Plain data: no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Combination:
    """Which reference seeds a candidate combines: indices into the class's seeds, and a weight for each."""

    parents: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """A decision with its evidence. `rule` names the filter and its threshold, such as "clip.margin"."""

    passed: bool
    rule: str
    score: float
    threshold: float
    reason: str


@dataclass(frozen=True)
class Reference:
    """An admitted reference: identified by the hash of its bytes."""

    sha256: str
    label: str
    origin: str  # where it was found, relative to the references' URI
    width: int
    height: int


@dataclass(frozen=True)
class Quarantined:
    """A file that is no usable reference, with the reason."""

    origin: str
    label: str
    reason: str
    sha256: str  # empty when the bytes could not be had
