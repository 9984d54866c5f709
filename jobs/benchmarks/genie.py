"""`seedloom benchmark genie`: ratios that share the model's calls beside one run for each ratio.

GeNIe-Ada (arXiv:2312.02548) redraws a source at every ratio. Two ways, which give the same images but for
rounding, take turns on the same sources, A B, B A, A B, …:

- aligned: the source is encoded once, and a ratio joins the batch at its first step;
- separate: for each ratio the source is encoded and redrawn alone.

Calls are of the model, guidance in the same call. Both ways put the same number of rows through it, so that
what is saved is what a call costs beside its rows, and the encoding: much where a small batch leaves a GPU
idle, little on a CPU. Decoding, features and the choice are the same for both and are not counted. Times are
medians over runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.turns import footer, measured_on, table, take_turns, tell, timed

if TYPE_CHECKING:
    from stages.contract import Backbone

RATIOS = ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7, 0.8, 0.9))  # of the paper's costs, and of its experiments
SEED = 7


def genie(
    model: Annotated[str, typer.Option(help="tangram, or an architecture: sd15, sdxl, …")] = "tangram",
    rows: Annotated[int, typer.Option(min=1, help="Sources in a batch.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the whole sampler; 50 in GeNIe.")] = 50,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of guidance; 1: none.")] = 7.5,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("genie.json"),
) -> None:
    """Compare GeNIe-Ada's step-aligned batch with a run for each ratio: calls of the model, and time."""
    from jobs.benchmarks import models
    from stages.backbones.device import default_device, precision_on

    device = default_device()
    made = models.model(model, device, precision_on(device))
    facts = {"model": model, **measure(made, rows, runs, steps, guidance)}
    tell(facts, describe(facts), out)


class Counted:
    """A backbone that counts the calls of its model and the rows that go through them."""

    def __init__(self, backbone: Backbone):
        self._backbone, self.calls, self.rows = backbone, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def embed_words(self, prompt: str, words: Mapping[str, Any]) -> Any:  # a protocol looks for it by name
        return self._backbone.embed_words(prompt, words)

    def predict(self, z_BCHW: Any, t: float, text: Any) -> Any:
        self.calls += 1
        self.rows += len(z_BCHW)
        return self._backbone.predict(z_BCHW, t, text)


def measure(backbone: Backbone, rows: int, runs: int, steps: int, guidance: float) -> dict[str, Any]:
    """Calls, rows and seconds of both ways, for each set of ratios."""
    import torch

    from stages.contract import Sampler
    from stages.generate.redraw import redraw
    from stages.sampling import condition

    rng = torch.Generator().manual_seed(SEED)
    side = backbone.image_size
    image_B3hw = torch.rand(rows, 3, side, side, generator=rng).mul(2).sub(1).to(backbone.device)
    noise_BCHW = torch.randn(rows, *backbone.latent_shape, generator=rng).to(backbone.device)
    asked, sampler = condition(backbone, "a ring", guidance, rows), Sampler(steps, guidance)

    def run(counted: Any, *groups: tuple[float, ...]) -> None:
        with torch.no_grad():
            for ratios in groups:
                redraw(counted, counted.encode(image_B3hw), noise_BCHW, asked, sampler, ratios)

    sets = []
    for ratios in RATIOS:
        groups = {"aligned": (ratios,), "separate": tuple((ratio,) for ratio in ratios)}
        counted = {name: Counted(backbone) for name in groups}
        for name in groups:
            run(counted[name], *groups[name])
        turns = take_turns(
            {name: partial(run, backbone, *groups[name]) for name in groups}, runs, backbone.device
        )
        sets.append(
            {
                "ratios": list(ratios),
                "ways": {
                    name: {
                        "calls": counted[name].calls,
                        "model_rows": counted[name].rows,
                        **turn.spread(),
                        "peak_bytes": turn.peak_bytes,
                    }
                    for name, turn in turns.items()
                },
                "faster": turns["aligned"].faster(turns["separate"]),
            }
        )
    return {
        "sets": sets,
        "rows": rows,
        "runs": runs,
        "steps": steps,
        "guidance": guidance,
        "precision": str(backbone.dtype).removeprefix("torch."),
        **measured_on(backbone.device, "diffusers"),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    rows = []
    for case in facts["sets"]:
        for name, way in case["ways"].items():
            first = name == "aligned"
            rows.append(
                (
                    ", ".join(f"{ratio:g}" for ratio in case["ratios"]) if first else "",
                    name,
                    str(way["calls"]),
                    str(way["model_rows"]),
                    timed(way),
                    f"{way['peak_bytes'] / 1e9:.2f}",
                    f"{case['faster']:.2f} ×" if first else "",
                )
            )
    heads = ("r", "way", "calls", "rows through the model", "seconds", "peak, GB", "aligned faster")
    return "\n\n".join(
        [
            f"{facts['model']}, {facts['precision']}: {facts['rows']} sources, {facts['steps']} steps,"
            f" guidance {facts['guidance']:g}; medians of {facts['runs']} runs (range).",
            table(heads, rows),
            footer(facts),
        ]
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(genie)
