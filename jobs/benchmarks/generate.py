"""`seedloom benchmark generate`: our text-to-image stage beside diffusers' own pipeline, on the same weights.

Each model is drawn with in three ways, which take turns, A B C, C B A, …:

- ours: the stage of a build, with all that is on by default on this device;
- diffusers: its pipeline in a plain loop, in the same precision and the same batch;
- diffusers, one by one: the same in batches of one image.

All give 8-bit images in the CPU's memory. Texts are embedded beforehand, for all ways alike. Work is what
`torch.utils.flop_counter` counts in one call of the denoiser and one of the decoder, a multiplication and an
addition counted as two; the device's rate is that of its best square matrix product in this precision.
Full-size models have random weights, on which speed does not depend (`jobs.benchmarks.models`), so nothing is
downloaded. On a CPU, where fifty steps of Stable Diffusion take minutes, one step is made of one image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.turns import (
    footer,
    gigabytes,
    measured_on,
    peak_of,
    table,
    take_turns,
    tell,
    timed,
    wait,
)
from schemas.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from jobs.benchmarks.models import Shape
    from stages.backbones.diffusion.model import LatentDiffusion
    from stages.contract import Sampler

OURS, THEIRS, ONE = "ours", "diffusers", "diffusers, one by one"
SEED = 3
PROMPT = "a ring"


@dataclass(frozen=True)
class Case:
    """How a model is drawn with."""

    model: str
    steps: int
    guidance: float
    batch: int
    scheduler: str = "ddim"


CASES = {
    "tangram": Case("tangram", 20, 4.0, 8),
    "sd15": Case("sd15", 50, 7.5, 16),
    "sd15-dpm": Case("sd15", 25, 7.5, 16, "dpm_solver++"),
    "sd21": Case("sd21", 50, 7.5, 16),
    "sd21-768": Case("sd21-768", 50, 7.5, 8),
    "sdxl": Case("sdxl", 25, 5.0, 8, "euler"),
    "sdxl-lightning": Case("sdxl", 4, 1.0, 8, "lightning"),
    "sd3": Case("sd3", 28, 7.0, 8, "flow"),
}
ON_CPU = {"tangram": CASES["tangram"], "sd15": Case("sd15", 1, 7.5, 1)}


def generate(
    case: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}; may be repeated. All, on a GPU.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a batch, in place of the case's.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("generate.json"),
) -> None:
    """Compare our text-to-image stage with diffusers' pipeline: images a second, TFLOP/s, memory."""
    from stages.backbones.device import default_device, precision_on

    device = default_device()
    known = CASES if device.type == "cuda" else ON_CPU
    chosen = case or list(known)
    for name in chosen:
        if name not in known:
            raise UserError(f"--case {name!r}: allowed on this device: {', '.join(known)}")
    facts = measure({name: known[name] for name in chosen}, device, precision_on(device), runs, batch=batch)
    tell(facts, describe(facts), out)


def measure(
    cases: Mapping[str, Case],
    device: torch.device,
    dtype: torch.dtype,
    runs: int,
    *,
    batch: int | None = None,
    shapes: Mapping[str, Shape] | None = None,
) -> dict[str, Any]:
    """Seconds, work and memory of each way, for each case."""
    import torch

    rate = matrix_rate(device, dtype)
    found = {}
    for name, case in cases.items():
        found[name] = _case(case, batch or case.batch, device, dtype, runs, shapes)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "cases": found,
        "matrix_tflops": rate / 1e12,
        "precision": str(dtype).removeprefix("torch."),
        "runs": runs,
        **measured_on(device, "diffusers"),
    }


def _case(
    case: Case,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    runs: int,
    shapes: Mapping[str, Shape] | None,
) -> dict[str, Any]:
    import torch

    from jobs.benchmarks import models
    from stages.contract import Sampler

    sampler = Sampler(case.steps, case.guidance, case.scheduler)  # type: ignore[arg-type]
    shapes = models.SHAPES if shapes is None else shapes
    ours = models.model(case.model, device, dtype, shapes)
    # on a GPU ours are compiled and laid out anew, and theirs are not to gain by it
    plain = ours if device.type == "cpu" else models.model(case.model, device, dtype, shapes, compile=False)
    z_BCHW = torch.randn(batch, *ours.latent_shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    draw = _pipeline(plain, sampler)
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: _ours(ours, z_BCHW, sampler),
        THEIRS: lambda: draw(z_BCHW),
    }
    if batch > 1:
        ways[ONE] = lambda: [draw(z_1CHW) for z_1CHW in z_BCHW.split(1)]
    turns = take_turns(ways, runs, device)
    call, decoding = work(plain)  # what is compiled hides its operations from the counter
    image = case.steps * (1 if case.guidance == 1 else 2) * call + decoding
    return {
        "model": case.model,
        "steps": case.steps,
        "guidance": case.guidance,
        "scheduler": case.scheduler,
        "batch": batch,
        "size": ours.image_size,
        "tflop": {"call": call / 1e12, "decoding": decoding / 1e12, "image": image / 1e12},
        "grey_levels_apart": _apart(turns[OURS].result, turns[THEIRS].result),
        "ways": {
            name: {
                **turn.spread(),
                "images_per_second": batch / turn.spread()["seconds"],
                "tflops": image * batch / turn.spread()["seconds"] / 1e12,
                "peak_bytes": turn.peak_bytes,
                "ours_faster": turns[OURS].faster(turn),
            }
            for name, turn in turns.items()
        },
    }


def _ours(backbone: LatentDiffusion, z_BCHW: Tensor, sampler: Sampler) -> Any:
    from stages.backbones.models import LoadedModels
    from stages.contract import Order
    from stages.generate.text_to_image import TextToImage
    from stages.images import to_uint8

    config = TextToImage.Config(steps=sampler.steps, guidance=sampler.guidance, scheduler=sampler.scheduler)
    models = LoadedModels(backbone.device, backbone)
    made = TextToImage(config)(backbone, models, Order(PROMPT, z_BCHW))
    return to_uint8(made.image_B3hw.nan_to_num())  # random weights may overflow


def _pipeline(backbone: LatentDiffusion, sampler: Sampler) -> Callable[[Tensor], Any]:
    """diffusers' pipeline around the networks of a backbone, as a function of latents."""
    import diffusers
    import numpy as np

    from stages.schedule import Flow

    text, no_words = backbone.embed([PROMPT]), backbone.embed([""])
    given: dict[str, Any] = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance}
    scheduler = scheduler_of(backbone, sampler)
    if isinstance(backbone.schedule, Flow):
        pipe: Any = diffusers.StableDiffusion3Pipeline(
            backbone.denoiser, scheduler, backbone.vae, None, None, None, None, None, None
        )
    elif text.pooled_BP is not None:
        pipe = diffusers.StableDiffusionXLPipeline(
            backbone.vae, None, None, None, None, backbone.denoiser, scheduler
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            backbone.vae, None, None, backbone.denoiser, scheduler, None, None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)

    def draw(z_BCHW: Tensor) -> Any:
        said, unsaid = text.expand(len(z_BCHW)), no_words.expand(len(z_BCHW))
        asked: dict[str, Any] = {
            "prompt_embeds": said.tokens_BLD,
            "negative_prompt_embeds": unsaid.tokens_BLD,
        }
        if said.pooled_BP is not None:
            asked |= {
                "pooled_prompt_embeds": said.pooled_BP,
                "negative_pooled_prompt_embeds": unsaid.pooled_BP,
            }
        images = pipe(**given, **asked, latents=z_BCHW.to(backbone.dtype), output_type="pil").images
        return np.stack([np.asarray(image) for image in images])

    return draw


def scheduler_of(backbone: LatentDiffusion, sampler: Sampler) -> Any:
    """diffusers' scheduler that steps as `sampler` says."""
    import diffusers

    from stages.schedule import Flow

    schedule = backbone.schedule
    if isinstance(schedule, Flow):
        return diffusers.FlowMatchEulerDiscreteScheduler(schedule.total, schedule.shift)
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "lightning": diffusers.EulerDiscreteScheduler,
        "dpm_solver++": diffusers.DPMSolverMultistepScheduler,
    }
    options: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": schedule.steps_offset,
        "prediction_type": schedule.prediction,
    }
    if sampler.scheduler == "ddim":
        options |= {"set_alpha_to_one": schedule.set_alpha_to_one, "clip_sample": False}
    spacing = "trailing" if sampler.scheduler == "lightning" else schedule.spacing
    if spacing is not None:
        options["timestep_spacing"] = spacing
    return classes[sampler.scheduler or "ddim"](**options)


def _apart(one: Any, other: Any) -> int:
    """The largest difference of two sets of 8-bit images."""
    import numpy as np

    return int(np.abs(one.astype(int) - other.astype(int)).max())


def work(backbone: LatentDiffusion) -> tuple[float, float]:
    """Operations of one call of the denoiser for one image, and of decoding one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    z_1CHW = torch.zeros(1, *backbone.latent_shape, device=backbone.device)
    text = backbone.embed([PROMPT])
    counted = []
    with torch.no_grad():
        for step in (lambda: backbone.predict(z_1CHW, 500, text), lambda: backbone.decode(z_1CHW)):
            with FlopCounterMode(display=False) as counter:
                step()
            counted.append(float(counter.get_total_flops()))
    return counted[0], counted[1]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the device's best square matrix product."""
    import torch

    side, times = (8192, 20) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        wait(device)
        begin = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    heads = (
        "case",
        "way",
        "s a batch",
        "images/s",
        "TFLOP/s",
        "of the rate",
        "peak, GB",
        "ours faster",
    )
    rows = []
    for name, case in facts["cases"].items():
        what = (
            f"{name}: {case['size']}², {case['steps']} × {case['scheduler']}, guidance {case['guidance']:g},"
            f" batch {case['batch']}"
        )
        for way, found in case["ways"].items():
            rows.append(_row(what if way == OURS else "", way, found, facts["matrix_tflops"]))
    apart = ", ".join(f"{name} {case['grey_levels_apart']}" for name, case in facts["cases"].items())
    return "\n\n".join(
        [
            f"{facts['precision']}; medians of {facts['runs']} runs (range); peak: {peak_of(facts)}; rate:"
            f" the device multiplies matrices at {facts['matrix_tflops']:.3g} TFLOP/s.",
            table(heads, rows),
            f"Largest difference of our images and diffusers', of 255: {apart}.",
            footer(facts),
        ]
    )


def _row(what: str, way: str, found: Mapping[str, Any], rate: float) -> Sequence[str]:
    return (
        what,
        way,
        timed(found),
        f"{found['images_per_second']:.3g}",
        f"{found['tflops']:.3g}",
        f"{found['tflops'] / rate:.0%}",
        gigabytes(found["peak_bytes"]),
        "" if way == OURS else f"{found['ours_faster']:.2f} ×",
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(generate)
