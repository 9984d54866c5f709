"""Contact sheets: one pair interpolated, and groups with their centroids, by several methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from jobs.evaluate.harness import Built
from jobs.evaluate.metrics import Observers
from jobs.tangram.drawings import CLASSES
from pipeline.config import method_of
from pipeline.plan import StreamPlan
from pipeline.seeds import load_seeds
from pipeline.store import Store
from schemas.ids import random_stream
from stages import images, registry
from stages.backbones.diffusion.load import load_backbone
from stages.backbones.models import LoadedModels
from stages.contract import Backbone, Combine, Order

PATHS: Mapping[str, Mapping[str, Any]] = {
    "LERP": {"method": "lerp"},
    "SLERP": {"method": "slerp"},
    "COG": {"method": "cog"},
    "NAO": {"method": "nao"},
}
CENTROIDS: Mapping[str, Mapping[str, Any]] = {
    "Euclidean": {"method": "euclidean"},
    "normalized": {"method": "normalized"},
    "COG": {"method": "cog", "mode": "centroid"},
    "NAO": {"method": "nao", "mode": "centroid"},
}
COLUMNS = 9  # points of a path, both ends included
SHOWN = 5  # seeds of a group
CELL, GAP, MARGIN, LINE = 96, 4, 84, 20  # pixels


def contact_sheets(
    folder: Path, built: Built, observers: Observers, groups: Sequence[int], steps: int
) -> list[Path]:
    """Write paths.png and centroids.png from the seeds of a build. Returns their paths."""
    backbone = load_backbone(built.plan.config.backbone, torch.device("cpu"))
    stream, z_KCHW, right = _shown_class(built, backbone, observers, steps)
    files = [folder / "paths.png", folder / "centroids.png"]
    _paths(backbone, stream, z_KCHW, right, steps).save(files[0], optimize=True)
    _centroids(backbone, stream, z_KCHW, groups, steps).save(files[1], optimize=True)
    return files


def _shown_class(
    built: Built, backbone: Backbone, observers: Observers, steps: int
) -> tuple[StreamPlan, Tensor, list[int]]:
    """The commonest class of which the judge knows two seeds, drawn as they are; else the rarest."""
    streams = sorted(built.plan.streams, key=lambda s: CLASSES.index(s.label))
    for stream in streams:
        z_KCHW = load_seeds(Store(built.plan.config.output), stream).z_KCHW
        pixels = torch.from_numpy(_draw(backbone, stream.prompt, z_KCHW, steps)).permute(0, 3, 1, 2)
        verdict_K = observers.look(pixels).verdict_N
        right = [k for k, verdict in enumerate(verdict_K) if CLASSES[verdict] == stream.label]
        if len(right) > 1:
            return stream, z_KCHW, right
    return stream, z_KCHW, [0, 1]


def _paths(
    backbone: Backbone, stream: StreamPlan, z_KCHW: Tensor, right: list[int], steps: int
) -> Image.Image:
    first, second = next(combinations(right, 2))
    places = [column / (COLUMNS - 1) for column in range(COLUMNS)]
    rows = {}
    for name, settings in PATHS.items():
        method = _method(settings)
        z_BCHW = torch.stack([method(z_KCHW[[first, second]], (1 - t, t), {}) for t in places])
        rows[name] = _draw(backbone, stream.prompt, z_BCHW, steps)
    return _sheet(stream, [f"t = {t:.3g}" for t in places], rows)


def _centroids(
    backbone: Backbone, stream: StreamPlan, z_KCHW: Tensor, groups: Sequence[int], steps: int
) -> Image.Image:
    rows = {}
    for k in groups:
        chosen = random_stream("contact sheet", k).choice(len(z_KCHW), size=k, replace=False)
        z_kCHW = z_KCHW[sorted(chosen.tolist())]
        middles = [_method({**s, "group": k})(z_kCHW, (1 / k,) * k, {}) for s in CENTROIDS.values()]
        # a short group is filled up with its first seed, so that the columns stay in line
        fill = [z_kCHW[min(i, k - 1)] for i in range(SHOWN)]
        rows[f"{k} seeds"] = _draw(backbone, stream.prompt, torch.stack([*middles, *fill]), steps)
        rows[f"{k} seeds"][len(middles) + k :] = 255
    return _sheet(stream, [*CENTROIDS, *(f"seed {i + 1}" for i in range(SHOWN))], rows)


def _method(settings: Mapping[str, Any]) -> Combine:
    return method_of(
        "combine", registry.resolve("combine", settings["method"]).Config.model_validate(settings)
    )


def _draw(backbone: Backbone, prompt: str, z_BCHW: Tensor, steps: int) -> Any:
    config = {"method": "text_to_image", "steps": steps, "guidance": 1.0}
    generate = registry.resolve("generate", "text_to_image")
    method = generate(generate.Config.model_validate(config))
    order = Order(prompt, z_BCHW.float())
    return images.to_uint8(method(backbone, LoadedModels(), order).image_B3hw)  # type: ignore[operator]


def _sheet(stream: StreamPlan, columns: Sequence[str], rows: Mapping[str, Any]) -> Image.Image:
    font = ImageFont.load_default(13)
    size = (MARGIN + len(columns) * (CELL + GAP), 2 * LINE + len(rows) * (CELL + GAP))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP, GAP), f'"{stream.prompt}", guidance 1', "black", font)
    for column, name in enumerate(columns):
        pen.text((MARGIN + column * (CELL + GAP), LINE + GAP), name, "gray", font)
    for row, (name, pictures) in enumerate(rows.items()):
        top = 2 * LINE + row * (CELL + GAP)
        pen.text((GAP, top + CELL // 2), name, "black", font)
        for column, picture in enumerate(pictures):
            cell = Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(cell, (MARGIN + column * (CELL + GAP), top))
    return page
