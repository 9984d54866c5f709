"""`seedloom benchmark inversion`: what each inversion costs and what it gives, with its own settings.

Methods take turns on the same images: rare drawings for tangram, smoothed noise for full-size models, whose
weights are random, so that their errors mean nothing and are left out. Calls are per image, guidance counted
twice. The latent error is between z_0 and what the seed is drawn to by the method's own sampler; how it
depends on steps and on the images, `seedloom evaluate inversion` says.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.turns import footer, gigabytes, measured_on, peak_of, table, take_turns, tell, timed

if TYPE_CHECKING:
    from torch import Tensor

NAIVE = "ddim"
SHAPES = ("gear", "octagon", "trapezoid", "six_pointed_star")
SEED = 17


def inversion(
    model: Annotated[str, typer.Option(help="tangram, or an architecture: sd15, sdxl, sd3, …")] = "tangram",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path(
        "inversion.json"
    ),
) -> None:
    """Compare the inversions: calls of the model, images a second, errors, how typical the seeds are."""
    from jobs.benchmarks import models
    from stages.backbones.device import default_device, precision_on

    device = default_device()
    backbone = models.model(model, device, precision_on(device))
    facts = {"model": model, **measure(backbone, images(model, backbone.image_size, batch), runs)}
    tell(facts, describe(facts), out)


def images(model: str, side: int, batch: int) -> Tensor:
    """(B, 3, h, w) in [-1, 1]."""
    import torch
    import torch.nn.functional as F

    if model == "tangram":
        from jobs.tangram.drawings import draw, generator
        from stages.images import to_tensor

        shapes = [SHAPES[i % len(SHAPES)] for i in range(batch)]
        drawn = [draw(shape, generator("benchmark", shape, i))[0] for i, shape in enumerate(shapes)]
        return torch.stack([to_tensor(picture, side) for picture in drawn])
    coarse = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(SEED))
    return F.interpolate(coarse, (side, side), mode="bicubic").tanh()


def measure(backbone: Any, image_B3hw: Tensor, runs: int) -> dict[str, Any]:
    """Calls, seconds, memory and measures of every method that the model can be inverted by."""
    from stages import registry
    from stages.schedule import Flow

    kind = "flow" if isinstance(backbone.schedule, Flow) else "diffusion"
    classes: dict[str, Any] = {name: registry.resolve("invert", name) for name in registry.names("invert")}
    methods = {name: cls(cls.Config()) for name, cls in classes.items() if kind in cls.needs or not cls.needs}
    image_B3hw = image_B3hw.to(backbone.device)
    ways = {name: partial(method, backbone, image_B3hw, "a ring") for name, method in methods.items()}
    turns = take_turns(ways, runs, backbone.device)
    found = {}
    for name, turn in turns.items():
        rows = turn.result.measures
        found[name] = {
            **turn.spread(),
            "steps": methods[name].config.steps,
            "images_per_second": len(image_B3hw) / turn.spread()["seconds"],
            "peak_bytes": turn.peak_bytes,
            **{
                key: statistics.fmean(row[key] for row in rows)
                for key in ("calls", "latent_mse", "psnr", "norm_ratio")
            },
        }
    return {
        "batch": len(image_B3hw),
        "size": backbone.image_size,
        "runs": runs,
        "precision": str(backbone.dtype).removeprefix("torch."),
        "ways": found,
        **measured_on(backbone.device, "diffusers"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown. Of random weights errors mean nothing, and are not told."""
    told = facts["model"] == "tangram"
    rows = []
    for name, way in facts["ways"].items():
        row: tuple[str, ...] = (
            name,
            str(way["steps"]),
            f"{way['calls']:.0f}",
            timed(way),
            f"{way['images_per_second']:.3g}",
        )
        if told:
            naive = facts["ways"].get(NAIVE, way)["latent_mse"]
            row += (
                f"{way['latent_mse']:.2e}",
                f"{naive / way['latent_mse']:.3g} ×",
                f"{way['psnr']:.1f}",
                f"{way['norm_ratio']:.3f}",
            )
        rows.append((*row, gigabytes(way["peak_bytes"])))
    heads: tuple[str, ...] = ("method", "steps", "calls an image", "s a batch", "images/s")
    heads += ("latent MSE", f"below {NAIVE}'s", "PSNR, dB", "norm/√d") if told else ()
    return "\n\n".join(
        [
            f"{facts['model']}, {facts['size']}², {facts['precision']}: batch {facts['batch']}; medians of"
            f" {facts['runs']} runs (range); peak: {peak_of(facts)}.",
            table((*heads, "peak, GB"), rows),
            footer(facts),
        ]
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(inversion)
