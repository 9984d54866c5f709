"""`seedloom show URI --subspace CLASS`: what the model draws in a plane through seeds of a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schemas.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENT = 2**0.5  # of the plane: as far from the middle as independent seeds are


def plane(plan: Any, uri: str, label: str, points: int) -> Image:
    """points × points images from the plane through the first three seeds of a class, their centroid amid.

    Great circles are straight lines in it. Seeds that are independent lie at √2 from the middle: the first
    half-way down the right edge, the two others on the left, above and below.
    """
    import torch
    from PIL import Image

    from pipeline.worker import Worker
    from stages.combine.subspace import grid
    from stages.images import to_uint8

    stream = next((s for s in plan.streams if s.label == label and s.seeds), None)
    if stream is None:
        known = ", ".join(sorted({s.label for s in plan.streams if s.seeds})) or "none"
        raise UserError(f"--subspace {label!r}: no recipe of this class has seeds; classes that do: {known}")
    worker = Worker(plan, uri)
    materials = worker.materials(stream.id)
    seeds = materials.seeds
    assert seeds is not None
    if len(seeds.references) < 3:
        raise UserError(f"--subspace {label!r}: a plane needs 3 seeds, there are {len(seeds.references)}")
    z_NCHW = grid(seeds.z_KCHW[:3], points, EXTENT).flatten(0, 1).float()
    page = None
    for start in range(0, len(z_NCHW), stream.batch):
        batch = z_NCHW[start : start + stream.batch]
        filled = torch.cat([batch, batch[:1].expand(stream.batch - len(batch), -1, -1, -1)])
        image_B3hw = (
            worker.dags[stream.recipe]
            .draw(stream, materials, [None] * stream.batch, filled.to(worker.device.torch))
            .image_B3hw
        )
        for place, pixels_hw3 in enumerate(to_uint8(image_B3hw)[: len(batch)], start):
            side = pixels_hw3.shape[0]
            page = page or Image.new("RGB", (points * side, points * side))
            page.paste(Image.fromarray(pixels_hw3), (place % points * side, place // points * side))
    assert page is not None
    return page
