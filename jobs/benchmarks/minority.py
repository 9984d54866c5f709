"""`seedloom benchmark minority`: what MinorityPrompt costs beside plain text-to-image.

Both are stages of a build (arXiv:2410.07838), on the same seeds, with all that is on by default on this
device, and take turns. Calls are of the model: guidance is in the same call, and a step of the optimiser
takes two calls and the way back through both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.benchmarks.genie import Counted
from jobs.benchmarks.turns import footer, gigabytes, measured_on, peak_of, table, take_turns, tell, timed

PLAIN, MINORITY = "text_to_image", "minority_prompt"
SEED = 13


def minority(
    model: Annotated[str, typer.Option(help="tangram, or an architecture: sd15, sdxl, …")] = "tangram",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of guidance; 1: none.")] = 7.5,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("minority.json"),
) -> None:
    """Compare MinorityPrompt with text-to-image: images a second, calls of the model, memory."""
    from jobs.benchmarks import models
    from stages.backbones.device import default_device, precision_on

    device = default_device()
    backbone = models.model(model, device, precision_on(device))
    facts = {"model": model, **measure(backbone, batch, steps, guidance, runs)}
    tell(facts, describe(facts), out)


def measure(backbone: Any, batch: int, steps: int, guidance: float, runs: int) -> dict[str, Any]:
    """Calls, seconds and memory of both methods."""
    import torch

    from stages.backbones.models import LoadedModels
    from stages.contract import Chance, Order
    from stages.generate.minority_prompt import MinorityPrompt
    from stages.generate.text_to_image import TextToImage

    device, rng = backbone.device, torch.Generator().manual_seed(SEED)
    z_BCHW = torch.randn(batch, *backbone.latent_shape, generator=rng).to(device)
    order = Order("a ring", z_BCHW, target="ring", chances=[Chance(i, ("benchmark",)) for i in range(batch)])
    settings = {"steps": steps, "guidance": guidance}
    methods: dict[str, Any] = {
        PLAIN: TextToImage(TextToImage.Config.model_validate(settings)),
        MINORITY: MinorityPrompt(MinorityPrompt.Config.model_validate(settings)),
    }
    counted = {name: Counted(backbone) for name in methods}
    for name, method in methods.items():
        method(counted[name], LoadedModels(device, backbone), order)
    ways = {name: partial(m, backbone, LoadedModels(device, backbone), order) for name, m in methods.items()}
    turns = take_turns(ways, runs, device)
    return {
        "batch": batch,
        "size": backbone.image_size,
        "steps": steps,
        "guidance": guidance,
        "runs": runs,
        "precision": str(backbone.dtype).removeprefix("torch."),
        "ways": {
            name: {
                **turn.spread(),
                "calls": counted[name].calls,
                "images_per_second": batch / turn.spread()["seconds"],
                "peak_bytes": turn.peak_bytes,
            }
            for name, turn in turns.items()
        },
        "slower": turns[PLAIN].faster(turns[MINORITY]),
        **measured_on(device, "diffusers"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        (
            name,
            str(way["calls"]),
            timed(way),
            f"{way['images_per_second']:.3g}",
            gigabytes(way["peak_bytes"]),
            f"{facts['slower']:.2f} ×" if name == MINORITY else "",
        )
        for name, way in facts["ways"].items()
    ]
    return "\n\n".join(
        [
            f"{facts['model']}, {facts['size']}², {facts['precision']}: batch {facts['batch']},"
            f" {facts['steps']} steps, guidance {facts['guidance']:g}; medians of {facts['runs']} runs"
            f" (range); peak: {peak_of(facts)}.",
            table(("method", "calls", "s a batch", "images/s", "peak, GB", "times as long"), rows),
            footer(facts),
        ]
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(minority)
