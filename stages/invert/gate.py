"""The gate: seeds that do not look like noise are inverted again with more steps, or refused with a reason.

A method can reconstruct an image perfectly from a latent that is not Gaussian, and then every combination of
such latents fails. So what is asked of a seed is not that it draws its image again, but that it is typical.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from stages.contract import Backbone, Invert, Inverted
from stages.invert.settings import InvertSettings, Typical


def fault(measures: Mapping[str, float], typical: Typical) -> str:
    """Why a seed with these measures is refused, or "" when it is typical."""
    for name, value, ideal, limit in (
        ("norm", measures["norm_ratio"], 1, typical.norm),
        ("autocorrelation", measures["autocorrelation"], 0, typical.autocorrelation),
        ("kurtosis", measures["kurtosis"], 0, typical.kurtosis),
    ):
        if limit is not None and not abs(value - ideal) <= limit:  # NaN is not typical either
            return f"{name} {value:.3f}, typical is {ideal} ± {limit:g}"
    return ""


def invert_typical(
    method: Invert, backbone: Backbone, image_B3hw: Float[Tensor, "B 3 h w"], prompt: str
) -> tuple[Inverted, list[str]]:
    """Seeds of a batch, and for each the reason why it is refused, or "".

    A second inversion has the batch's shape and every row its slot, so no row depends on which others fail.
    `steps` is that of the inversion that a seed comes from, `calls` counts both of a seed that had two.
    """
    config = cast(InvertSettings, method.config)
    first = _counted(method(backbone, image_B3hw, prompt), config.steps)
    if config.typical is None:
        return first, [""] * len(first.measures)
    reasons = [fault(measures, config.typical) for measures in first.measures]
    if config.typical.steps is None or not any(reasons):
        return first, reasons
    slower = type(method)(config.model_copy(update={"steps": config.typical.steps}))
    again = _counted(slower(backbone, image_B3hw, prompt), config.typical.steps)
    refused_B = torch.tensor([bool(reason) for reason in reasons], device=first.z_BCHW.device)
    z_BCHW = torch.where(refused_B[:, None, None, None], again.z_BCHW, first.z_BCHW)
    pairs = zip(first.measures, again.measures, reasons, strict=True)
    measures = [{**b, "calls": a["calls"] + b["calls"]} if reason else a for a, b, reason in pairs]
    return Inverted(z_BCHW, measures), [fault(m, config.typical) for m in measures]


def _counted(inverted: Inverted, steps: int) -> Inverted:
    return Inverted(inverted.z_BCHW, [{**m, "steps": float(steps)} for m in inverted.measures])
