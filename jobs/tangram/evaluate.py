"""The figures that tangram must reach, computed anew from a layout's own weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs.tangram.clip import CLASS_PROMPTS
from jobs.tangram.data import balanced
from jobs.tangram.drawings import CLASSES, HEAD, MIDDLE, RARE
from jobs.tangram.parts import (
    GUIDANCE,
    STEPS,
    Tangram,
    class_scores,
    clip_scores,
    load,
    noise_of,
    paint,
    reconstruct,
)
from stages.backbones.weights import TANGRAM

HELD_OUT_PER_CLASS = 50  # drawings that nothing was trained on
PAINTED_PER_CLASS = 40


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured value; `low` and `high` are the 95 % Wilson interval of a share."""

    value: float
    n: int
    target: str
    reached: bool | None  # None: nothing was promised
    low: float | None = None
    high: float | None = None


def evaluate(weights: Path | None = None) -> dict[str, Any]:
    """Measure a layout (the shipped one by default). Returns figures by name, and accuracy by class."""
    tangram = load(TANGRAM if weights is None else weights)
    figures = _on_drawings(tangram)
    painted = _text_to_image(tangram)
    for group, classes, target in (("head", HEAD, 0.95), ("middle", MIDDLE, None), ("rarest", RARE, None)):
        hits = torch.cat([painted[shape] for shape in classes])
        figures[f"text-to-image, {group} third"] = _share(hits, target)
    head, rare = figures["text-to-image, head third"], figures["text-to-image, rarest third"]
    assert rare.high is not None
    assert head.low is not None
    gap = Figure(
        value=head.value - rare.value,
        n=head.n + rare.n,
        target="intervals apart",
        reached=rare.high < head.low,
    )
    return {
        "figures": {name: asdict(figure) for name, figure in {**figures, "head minus rarest": gap}.items()},
        "per_class": {shape: hits.float().mean().item() for shape, hits in painted.items()},
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "prompt": "a photo of a {class}"},
    }


def print_figures(results: dict[str, Any]) -> None:
    """The table: what was measured, what was promised, reached or MISSED."""
    table = Table("figure", "value", "95 % interval", "n", "target", "")
    for name, figure in results["figures"].items():
        table.add_row(name, *row_of(name, figure))
    console = Console()
    console.print(table)
    accuracies = ", ".join(f"{name} {value:.2f}" for name, value in results["per_class"].items())
    console.print(f"text-to-image by class, commonest first: {accuracies}")


def row_of(name: str, figure: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Value, interval, n, target and verdict of a figure, as text."""
    value = f"{figure['value']:.1f} dB" if "PSNR" in name else f"{figure['value']:.3f}"
    interval = "" if figure["low"] is None else f"{figure['low']:.3f} to {figure['high']:.3f}"
    verdict = {True: "reached", False: "MISSED", None: "reported"}[figure["reached"]]
    return value, interval, str(figure["n"]), figure["target"], verdict


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927)."""
    z, p = 1.959964, hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def psnr(pixels: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels (uint8) of a set of pictures."""
    error = (pixels.float() - other.float()).square().mean()
    return (10 * torch.log10(255.0**2 / error)).item()


def _on_drawings(tangram: Tangram) -> dict[str, Figure]:
    data = balanced("held_out", HELD_OUT_PER_CLASS)
    decibel = psnr(data.pixels, reconstruct(tangram, data.pixels))
    return {
        "VAE reconstruction PSNR": Figure(
            value=decibel, n=len(data.pixels), target="≥ 30 dB", reached=decibel >= 30
        ),
        "CLIP zero-shot accuracy": _share(clip_scores(tangram, data.pixels).argmax(1) == data.labels, 0.95),
        "classifier accuracy": _share(
            class_scores(tangram.classifier, data.pixels).argmax(1) == data.labels, 0.98
        ),
        "judge accuracy": _share(class_scores(tangram.judge, data.pixels).argmax(1) == data.labels, 0.98),
    }


def _text_to_image(tangram: Tangram) -> dict[str, torch.Tensor]:
    """For every class, which of its painted pictures the judge takes for that class."""
    hits = {}
    for label, (shape, prompt) in enumerate(zip(CLASSES, CLASS_PROMPTS, strict=True)):
        seeds = torch.stack([noise_of(shape, index) for index in range(PAINTED_PER_CLASS)])
        pictures = paint(tangram, [prompt] * PAINTED_PER_CLASS, seeds)
        hits[shape] = class_scores(tangram.judge, pictures).argmax(1) == label
    return hits


def _share(hits: torch.Tensor, target: float | None) -> Figure:
    count, n = int(hits.sum()), len(hits)
    low, high = wilson(count, n)
    return Figure(
        value=count / n,
        n=n,
        low=low,
        high=high,
        target="" if target is None else f"≥ {target:.2f}",
        reached=None if target is None else count / n >= target,
    )
