"""`seedloom benchmark seedselect`: our refinement of seeds beside a plain loop over one seed at a time.

SeedSelect (arXiv:2304.14530) as published, with its exact gradient through all steps of the sampler. Two
ways, which take turns on the same seeds and references:

- ours: the stage of a build, a batch of seeds in the device's precision;
- loop: one seed after another in float32, each step of the sampler and each decoding recomputed for the
  gradient (checkpointed), as the published code does it.

Both start at the same seeds and take the same number of AdamW's steps. The final losses are compared, each
taken in float32 by the loop's own function, on the seed that a way ended at. A seed's work is what a call and
a decoding take (`generate.work`), forward, again for the gradient, and twice that backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.generate import matrix_rate, work
from jobs.benchmarks.turns import (
    footer,
    gigabytes,
    measured_on,
    peak_of,
    table,
    take_turns,
    tell,
    timed,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stages.contract import Backbone, ClipModel, Sampler

OURS, LOOP = "ours", "loop"
SEED, REFERENCES = 5, 4
OMEGA, SEMANTIC = (0.05, 0.25, 0.7), 10.0
LR = 0.1


def seedselect(
    model: Annotated[str, typer.Option(help="tangram, or an architecture: sd15, sdxl, …")] = "tangram",
    batch: Annotated[int, typer.Option(min=1, help="Seeds in a batch of ours.")] = 8,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of guidance; 1: none.")] = 7.5,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path(
        "seedselect.json"
    ),
) -> None:
    """Compare our batched SeedSelect with a float32 loop over single seeds: seeds an hour, loss, memory."""
    import torch

    from jobs.benchmarks import models
    from stages.backbones.device import default_device, precision_on
    from stages.contract import Sampler

    device = default_device()
    ours = models.model(model, device, precision_on(device))
    plain = ours
    if device.type == "cuda":
        plain = models.model(model, device, torch.float32, compile=False)
    clips = [models.clip(model, device, dtype) for dtype in (None, torch.float32)]
    facts = measure(ours, plain, clips[0], clips[1], Sampler(steps, guidance), batch, iterations, runs)
    tell(facts, describe({"model": model, **facts}), out)


def measure(
    ours: Any,
    plain: Any,
    clip: ClipModel,
    plain_clip: ClipModel,
    sampler: Sampler,
    batch: int,
    iterations: int,
    runs: int,
) -> dict[str, Any]:
    """Seconds, memory and final losses of both ways. `plain` and `plain_clip` are in float32."""
    import torch

    from stages.backbones.models import LoadedModels
    from stages.contract import Chance, Material, Order
    from stages.refine.seedselect import SeedSelect

    device, rng = ours.device, torch.Generator().manual_seed(SEED)
    side = ours.image_size
    image_N3hw = torch.rand(REFERENCES, 3, side, side, generator=rng).mul(2).sub(1).to(device)
    z_BCHW = torch.randn(batch, *ours.latent_shape, generator=rng).to(device)

    class Given(LoadedModels):
        """With one CLIP model, whatever it is called."""

        def clip(self, name: str) -> ClipModel:
            return clip

    models = Given(device, ours)
    method = SeedSelect(SeedSelect.Config.model_validate({"iterations": iterations, "lr": LR}))
    artifact = method.prepare(ours, models, Material(image_N3hw, "ring", "a ring", Chance(0, ("benchmark",))))

    def refine() -> Tensor:
        chances = [Chance(i, ("benchmark",)) for i in range(batch)]
        order = Order("a ring", z_BCHW, target="ring", chances=chances, artifact=artifact)
        return method(ours, models, order, sampler).z_BCHW

    def loop() -> Tensor:
        return torch.cat(
            [_refined(plain, plain_clip, z_1CHW, artifact, sampler, iterations) for z_1CHW in z_BCHW.split(1)]
        )

    turns = take_turns({OURS: refine, LOOP: loop}, runs, device)

    def losses(z_BCHW: Tensor) -> list[float]:
        with torch.no_grad():
            rows = z_BCHW.float().split(1)
            return [float(_loss(plain, plain_clip, z_1CHW, artifact, sampler)) for z_1CHW in rows]

    call, decoding = work(ours)
    calls = sampler.steps * (1 if sampler.guidance == 1 else 2)
    return {
        "batch": batch,
        "iterations": iterations,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "size": side,
        "runs": runs,
        "tflop": 4 * (calls * call + len(OMEGA) * decoding) / 1e12,
        "matrix_tflops": {
            OURS: matrix_rate(device, ours.dtype) / 1e12,
            LOOP: matrix_rate(device, plain.dtype) / 1e12,
        },
        "start": losses(z_BCHW),
        "ways": {
            name: {
                **turn.spread(),
                "precision": str(way.dtype).removeprefix("torch."),
                "seeds_per_hour": 3600 * batch / turn.spread()["seconds"],
                "peak_bytes": turn.peak_bytes,
                "losses": losses(turn.result),
            }
            for (name, turn), way in zip(turns.items(), (ours, plain), strict=True)
        },
        "faster": turns[OURS].faster(turns[LOOP]),
        **measured_on(device, "diffusers", "open_clip_torch"),
    }


def _loss(
    backbone: Backbone, clip: ClipModel, z_1CHW: Tensor, artifact: Mapping[str, Tensor], sampler: Sampler
) -> Tensor:
    """The published loss of one seed, with as little kept for its gradient as can be."""
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    from stages.sampling import condition, ddim_step, path_of, predict_guided

    path, asked = path_of(backbone, sampler), condition(backbone, "a ring", sampler.guidance, 1)
    latents = []

    def step(z_1CHW: Tensor, k: int) -> Tensor:
        output_1CHW = predict_guided(backbone, z_1CHW, path.times[k], asked)
        return ddim_step(
            z_1CHW, output_1CHW, path.levels[k], path.levels[k + 1], backbone.schedule.prediction
        )

    def distance(z_1CHW: Tensor) -> Tensor:
        seen_1E = clip.encode_image(backbone.decode(z_1CHW))
        return 1 - F.cosine_similarity(seen_1E, artifact["clip_E"][None].float(), dim=1)[0]

    for k in range(sampler.steps):
        z_1CHW = checkpoint(step, z_1CHW, k, use_reentrant=False)
        latents.append(z_1CHW)
    loss = (latents[-1] - artifact["latent_CHW"]).square().mean()
    for omega, z_j in zip(OMEGA, latents[-len(OMEGA) :], strict=True):
        loss = loss + SEMANTIC * omega * checkpoint(distance, z_j, use_reentrant=False)
    return loss


def _refined(
    backbone: Backbone,
    clip: ClipModel,
    z_1CHW: Tensor,
    artifact: Mapping[str, Tensor],
    sampler: Sampler,
    iterations: int,
) -> Tensor:
    """AdamW on one seed; what was there is kept where the last loss is above the first."""
    import torch

    seed_1CHW = z_1CHW.float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([seed_1CHW], lr=LR)
    first = None
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = _loss(backbone, clip, seed_1CHW, artifact, sampler)
        first = float(loss.detach()) if first is None else first
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        last = float(_loss(backbone, clip, seed_1CHW, artifact, sampler))
    assert first is not None
    return seed_1CHW.detach() if last <= first else z_1CHW


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    import statistics

    rows = []
    for name, way in facts["ways"].items():
        # a last look at the whole loss, without a gradient, is a third of an iteration
        spent = facts["tflop"] * (facts["iterations"] + 0.25) * facts["batch"] / way["seconds"]
        rows.append(
            (
                name,
                f"{way['precision']}, batch {facts['batch'] if name == OURS else 1}",
                timed(way),
                f"{way['seeds_per_hour']:.4g}",
                f"{spent:.3g} ({spent / facts['matrix_tflops'][name]:.0%})",
                gigabytes(way["peak_bytes"]),
                f"{statistics.fmean(way['losses']):.4f}",
                f"{facts['faster']:.2f} ×" if name == OURS else "",
            )
        )
    heads = (
        "way",
        "how",
        "seconds",
        "seeds/hour",
        "TFLOP/s (of the rate)",
        "peak, GB",
        "final loss",
        "ours faster",
    )
    return "\n\n".join(
        [
            f"{facts['model']}, {facts['size']}²: {facts['batch']} seeds, {facts['iterations']} iterations"
            f" through {facts['steps']} steps, guidance {facts['guidance']:g}; loss at the start"
            f" {statistics.fmean(facts['start']):.4f}; medians of {facts['runs']} runs (range); peak:"
            f" {peak_of(facts)}.",
            table(heads, rows),
            footer(facts),
        ]
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(seedselect)
