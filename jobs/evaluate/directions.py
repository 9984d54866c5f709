"""`seedloom evaluate directions`: does one edit move all seeds the same way, and another image's seed too?

After Table 3 of Ramachandran et al. (AAAI 2024). Drawings of a head, a middle and a rare class, and
photographs, which are far from what tangram learned, are inverted as they are and edited (blur, grey, box).

- Angles: between the directions of two images, averaged over all pairs; as the paper takes them, from seed to
  edited seed by subtraction, and between tangent vectors at a common point. Two controls: directions to the
  edited seed of another image, which share all that edited seeds have in common, and random directions.
- Effect: the mean direction of all other images is applied to an image's seed, and what is drawn from it is
  compared with the really edited image. Beside it stand doing nothing, and what is drawn from the edited
  image's own seed, which is the most that is to be had.

A photograph is its central square, one from each.

Shape letters: N images, R resamples, C H W seed, h w image.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from jobs.evaluate.harness import Result
    from jobs.evaluate.metrics import Array, Measure, Statistic
    from stages.contract import Backbone, Sampler

CLASSES = ("circle", "hexagon", "octagon")  # 3000, 322 and 13 drawings in tangram's training
PHOTOGRAPHS = {  # in colour, and shipped inside these packages
    "scikit-image": (
        "skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png",
        "skimage/data/hubble_deep_field.jpg", "skimage/data/ihc.png", "skimage/data/motorcycle_left.png",
        "skimage/data/retina.jpg", "skimage/data/rocket.jpg",
    ),
    "scikit-learn": ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
}  # fmt: skip
STEPS, BATCH = 50, 8
PUBLISHED = (
    "published angles (blur / grey / box): SPHInX 1.12 / 0.89 / 1.05, DAE 0.09 / 0.07 / 0.08,"
    " LDM 0.08 / 0.11 / 0.09"
)
COLUMNS = ("image", "its seed", "edited", "its seed", "direction")  # of the sheet


@dataclass(frozen=True)
class Strip:
    """One image under one edit, as the sheet shows it."""

    set: str
    edit: str
    pictures: tuple[Tensor, ...]  # (3, h, w) each, in the order of COLUMNS


def directions(
    n: Annotated[int, typer.Option(min=4, help="Drawings of each class.")] = 24,
    out: Annotated[Path, typer.Option(help="Folder for tables, figure and picture.")] = Path(
        "out/evaluate/directions"
    ),
    quick: Annotated[bool, typer.Option(help="Four images of two sets in two steps: to see it run.")] = False,
) -> None:
    """Is an edit one direction for all seeds? Angles between directions, and their effect on other seeds."""
    from jobs.evaluate.report import Heading, write
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings
    from stages.contract import Sampler

    started = time.monotonic()
    backbone = load_backbone(BackboneSettings())
    sampler = Sampler(2 if quick else STEPS, 1.0)
    results, strips = [], []
    for name, prompt, image_N3hw in _sets(
        backbone.image_size, 4 if quick else n, CLASSES[: 1 if quick else 3]
    ):
        result, shown = examine(backbone, name, prompt, image_N3hw, sampler)
        results.append(result)
        strips += shown
    headings = {
        "angle": Heading("angle, rad"),
        "tangents": Heading("of tangents, rad"),
        "psnr": Heading("PSNR, dB", ".2f"),
        "norm": Heading("norm/√d"),
    }
    notes = (PUBLISHED, f"{time.monotonic() - started:.0f} s")
    files = write(out, "directions", results, headings, notes)
    files.append(out / "directions_sheet.png")
    sheet(strips).save(files[-1])
    print(*files, sep="\n")


def examine(
    backbone: Backbone, name: str, prompt: str, image_N3hw: Tensor, sampler: Sampler
) -> tuple[Result, list[Strip]]:
    """Every edit on one set of images."""
    import torch

    from jobs.evaluate.harness import Result
    from jobs.evaluate.metrics import compare, estimate, mean_of, resamples
    from schemas.ids import random_stream
    from stages.combine.direction import EDITS, gathered, pairwise_angles
    from stages.invert.measure import psnr

    n = len(image_N3hw)
    times_RN = resamples(range(n))

    def angle(direction_NCHW: Tensor) -> Measure:
        return estimate(over_pairs(pairwise_angles(direction_NCHW).numpy()), times_RN, n)

    def mean(x_N: Tensor) -> Measure:
        return estimate(mean_of(x_N.double().numpy()), times_RN, n)

    z_NCHW = _inverted(backbone, image_N3hw, prompt, sampler)
    again_N3hw = _drawn(backbone, z_NCHW, prompt, sampler)
    noise_NCHW = torch.from_numpy(random_stream("directions", name).standard_normal(z_NCHW.shape))
    rows: dict[str, Mapping[str, Measure]] = {
        "random": {"angle": angle(noise_NCHW)},
        "unedited": {"norm": mean(_norm(z_NCHW))},
    }
    asked, strips = [], []
    for edit, apply in EDITS.items():
        edited_N3hw = apply(image_N3hw)
        edited_NCHW = _inverted(backbone, edited_N3hw, prompt, sampler)
        moved_N3hw = _drawn(backbone, moved_by_the_others(z_NCHW, edited_NCHW), prompt, sampler)
        own_N3hw = _drawn(backbone, edited_NCHW, prompt, sampler)
        others_NCHW = edited_NCHW.roll(1, dims=0)
        rows |= {
            edit: {
                "angle": angle(edited_NCHW - z_NCHW),
                "tangents": angle(gathered(z_NCHW, edited_NCHW)[1]),
                "psnr": mean(psnr(edited_N3hw, moved_N3hw)),
                "norm": mean(_norm(edited_NCHW)),
            },
            f"{edit}, another image's": {
                "angle": angle(others_NCHW - z_NCHW),
                "tangents": angle(gathered(z_NCHW, others_NCHW)[1]),
            },
            f"{edit}, nothing done": {"psnr": mean(psnr(edited_N3hw, again_N3hw))},
            f"{edit}, its own seed": {"psnr": mean(psnr(edited_N3hw, own_N3hw))},
        }
        asked += [
            (edit, f"{edit}, another image's", "angle"),
            (edit, f"{edit}, another image's", "tangents"),
            (edit, f"{edit}, nothing done", "psnr"),
        ]
        pictures = (image_N3hw, again_N3hw, edited_N3hw, own_N3hw, moved_N3hw)
        strips.append(Strip(name, edit, tuple(picture_N3hw[0] for picture_N3hw in pictures)))
    title = (
        f"directions from seed to edited seed, d = {z_NCHW[0].numel()}; DDIM inversion and sampling in"
        f" {sampler.steps} steps, guidance {sampler.guidance:g}; PSNR against the edited image"
    )
    differences = {key: compare(rows[key[0]][key[2]], rows[key[1]][key[2]]) for key in asked}
    return Result(name, title, rows, differences), strips


def moved_by_the_others(z_NCHW: Tensor, edited_NCHW: Tensor) -> Tensor:
    """Each seed moved by the mean direction of all other images: what it looks like edited is not asked."""
    import torch

    from stages.combine.direction import apply_direction, gathered

    moved = []
    for i, z_CHW in enumerate(z_NCHW):
        others = [k for k in range(len(z_NCHW)) if k != i]
        base_CHW, direction_MCHW = gathered(z_NCHW[others], edited_NCHW[others])
        moved.append(apply_direction(z_CHW, base_CHW, direction_MCHW.mean(dim=0)))
    return torch.stack(moved)


def over_pairs(value_NN: Array) -> Statistic:
    """The mean over pairs of different images; one that a resample holds twice is no pair with itself."""
    import numpy as np

    def statistic(times_RN: Array) -> Array:
        apart_NN = value_NN * (1 - np.eye(len(value_NN)))
        pairs_R = times_RN.sum(axis=1) ** 2 - (times_RN**2).sum(axis=1)
        total_R = np.einsum("rn,nm,rm->r", times_RN, apart_NN, times_RN)
        return np.divide(total_R, pairs_R, out=np.full(len(pairs_R), np.nan), where=pairs_R > 0)

    return statistic


def sheet(strips: list[Strip]) -> Image:
    """A block a set, a row an edit: an image, edited, and moved by the direction of the others."""
    from PIL import Image, ImageDraw, ImageFont

    from stages.images import to_uint8

    font = ImageFont.load_default(11)
    sets = list(dict.fromkeys(strip.set for strip in strips))
    edits = list(dict.fromkeys(strip.edit for strip in strips))
    side = strips[0].pictures[0].shape[-1]
    cell, left, top, gap = side + 4, 40, 34, 16  # pixels
    block = len(COLUMNS) * cell + gap
    page = Image.new("RGB", (left + block * len(sets), top + cell * len(edits)), "white")
    pen = ImageDraw.Draw(page)
    for place, name in enumerate(sets):
        pen.text((left + place * block, 2), name, "black", font)
        for c, column in enumerate(COLUMNS):
            pen.text((left + place * block + c * cell, 17), column, "black", font)
    for place, edit in enumerate(edits):
        pen.text((4, top + place * cell + side // 2), edit, "black", font)
    for strip in strips:
        x, y = left + sets.index(strip.set) * block, top + edits.index(strip.edit) * cell
        for c, picture_3hw in enumerate(strip.pictures):
            page.paste(Image.fromarray(to_uint8(picture_3hw[None])[0]), (x + c * cell, y))
    return page


def _sets(size: int, n: int, classes: tuple[str, ...]) -> Iterator[tuple[str, str, Tensor]]:
    """Name, prompt and images of each set."""
    import torch

    from jobs.evaluate.harness import drawings
    from jobs.tangram.data import to_model
    from stages.images import to_tensor

    for shape in classes:
        yield shape, f"a photo of a {shape.replace('_', ' ')}", to_model(drawings((shape,), n, 0)[1])
    yield "photographs", "", torch.stack([to_tensor(image, size) for image in _photographs()[:n]])


def _photographs() -> list[Image]:
    from importlib.metadata import PackageNotFoundError, distribution

    from stages.images import decode

    found = []
    for package, names in PHOTOGRAPHS.items():
        try:
            inside = distribution(package)
        except PackageNotFoundError as error:
            raise UserError(f"the photographs are those of {package}: pip install {package}") from error
        found += [decode(Path(str(inside.locate_file(name))).read_bytes()) for name in names]
    return found


def _inverted(backbone: Backbone, image_N3hw: Tensor, prompt: str, sampler: Sampler) -> Tensor:
    import torch

    from stages.invert.ddim import invert_ddim

    with torch.no_grad():
        seeds = [
            invert_ddim(backbone, backbone.encode(image_B3hw.to(backbone.device)), prompt, sampler)
            for image_B3hw in image_N3hw.split(BATCH)
        ]
    return torch.cat(seeds).cpu()


def _drawn(backbone: Backbone, z_NCHW: Tensor, prompt: str, sampler: Sampler) -> Tensor:
    import torch

    from stages.sampling import denoise

    with torch.no_grad():
        drawn = [
            backbone.decode(denoise(backbone, z_BCHW.to(backbone.device), prompt, sampler))
            for z_BCHW in z_NCHW.split(BATCH)
        ]
    return torch.cat(drawn).cpu()


def _norm(z_NCHW: Tensor) -> Tensor:
    return z_NCHW.double().flatten(1).norm(dim=1) / z_NCHW[0].numel() ** 0.5


if __name__ == "__main__":
    from jobs.entry import run

    run(directions)
