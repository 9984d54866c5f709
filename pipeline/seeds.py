"""Reference seeds as they are kept: one object an image, with what was measured of it and why it is refused.

Shape letters: K seeds, C H W latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import Recipe, method_of
from pipeline.plan import StreamPlan
from pipeline.store import Store
from pipeline.tasks import SeedsReceipt
from pipeline.tensors import read_measured, to_safetensors
from schemas.errors import UserError
from schemas.records import Reference

# The correlation of independent seeds is this many standard deviations from 0 once in some hundred classes.
TELLING = 3.0


def seed_name(seeds: str, reference: Reference) -> str:
    return f"seeds/{seeds}/{reference.sha256}.safetensors"


def no_seed(reason: str) -> bytes:
    """What is kept in place of the seed of a reference that has none."""
    return to_safetensors({}, {"refused": reason})


@dataclass(frozen=True)
class Seeds:
    """The seeds of a stream: those that its candidates combine, and the references that were left out."""

    references: tuple[Reference, ...]
    z_KCHW: Tensor
    refused: tuple[tuple[Reference, str], ...]  # with the reason

    @cached_property
    def cosines_KK(self) -> Tensor:
        """Cosines of the seeds with one another, float64."""
        z_Kd = F.normalize(self.z_KCHW.flatten(1).double(), dim=1)
        return z_Kd @ z_Kd.T

    def correlation(self, chosen: tuple[int, ...]) -> float | None:
        """Mean cosine over the pairs of these seeds: about 0 when they are independent. None for one seed."""
        k = len(chosen)
        if k < 2:
            return None
        cosines_KK = self.cosines_KK[list(chosen)][:, list(chosen)]
        return float((cosines_KK.sum() - cosines_KK.diagonal().sum()) / (k * (k - 1)))


def load_seeds(store: Store, stream: StreamPlan) -> Seeds:
    """Read the seeds of a stream. Raises `FileNotFoundError` and `Damaged`."""
    assert stream.seeds is not None
    used, latents, refused = [], [], []
    for reference in stream.references:
        tensors, measures = read_measured(store, seed_name(stream.seeds, reference))
        if reason := measures["refused"]:
            refused.append((reference, reason))
        else:
            used.append(reference)
            latents.append(tensors["z_CHW"])
    return Seeds(tuple(used), torch.stack(latents) if latents else torch.empty(0), tuple(refused))


def assess(stream: StreamPlan, recipe: Recipe, seeds: Seeds) -> SeedsReceipt:
    """Whether the seeds suffice, and what is to be known of them. Raises `UserError` when they do not."""
    assert recipe.combine is not None
    method = method_of("combine", recipe.combine)
    needed = method.seeds_needed()
    if len(seeds.references) < needed:
        reference, reason = seeds.refused[0]
        raise UserError(
            f"class {stream.label!r}: {len(seeds.references)} of {len(stream.references)} seeds are typical,"
            f" but {method.name} in recipe {stream.recipe!r} needs {needed} ({reference.origin}: {reason});"
            f" loosen recipes.{stream.recipe}.invert.typical, give it more steps, or add images"
        )
    return SeedsReceipt(
        len(seeds.references),
        {r.origin: reason for r, reason in seeds.refused},
        seeds.correlation(tuple(range(len(seeds.references)))),
        seeds.z_KCHW[0].numel(),
        needed,
    )


def remark(name: str, receipt: SeedsReceipt) -> str | None:
    """What a person should know of a stream's seeds, in a line; None when there is nothing to say."""
    said = []
    if receipt.refused:
        origin, reason = next(iter(receipt.refused.items()))
        said.append(
            f"{len(receipt.refused)} of {receipt.used + len(receipt.refused)} seeds are not typical and are"
            f" left out ({origin}: {reason})"
        )
    pairs = receipt.used * (receipt.used - 1) / 2
    rho, k = receipt.correlation, receipt.combined
    if rho is not None and abs(rho) > TELLING / math.sqrt(receipt.dimensions * pairs) and k > 1:
        norm = math.sqrt(max(0.0, 1 + (k - 1) * rho))
        said.append(
            f"seeds correlate by {rho:.3f}, so the sum of {k} that are taken as independent has norm"
            f" {norm:.3f}·√d; `whiten: true` corrects it"
        )
    return f"{name}: " + "; ".join(said) if said else None
