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

import json
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    from stages.contract import Backbone

RATIOS = ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7, 0.8, 0.9))  # of the paper's costs, and of its experiments
SEED = 7


def genie(
    rows: Annotated[int, typer.Option(min=1, help="Sources in a batch.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    steps: Annotated[int, typer.Option(min=10, help="Steps of the whole sampler; 50 in GeNIe.")] = 50,
    guidance: Annotated[float, typer.Option(min=0, help="Scale of guidance; 1: none.")] = 7.5,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("genie.json"),
) -> None:
    """Compare GeNIe-Ada's step-aligned batch with a run for each ratio: calls of the model, and time."""
    from stages.backbones.device import default_device
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings

    facts = measure(load_backbone(BackboneSettings(), default_device()), rows, runs, steps, guidance)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    show(facts)
    print(f"figures: {out}")


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
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()

    sets = []
    for ratios in RATIOS:
        ways = {"aligned": (ratios,), "separate": tuple((ratio,) for ratio in ratios)}
        counted = {name: Counted(backbone) for name in ways}
        for name, groups in ways.items():
            run(counted[name], *groups)  # counts, and warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(runs):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                seconds[name].append(_timed(partial(run, backbone, *ways[name])))
        sets.append(
            {
                "ratios": list(ratios),
                "ways": {
                    name: {
                        "calls": counted[name].calls,
                        "model_rows": counted[name].rows,
                        "seconds": statistics.median(seconds[name]),
                        "fastest": min(seconds[name]),
                        "slowest": max(seconds[name]),
                    }
                    for name in ways
                },
                "faster": statistics.median(
                    s / a for a, s in zip(seconds["aligned"], seconds["separate"], strict=True)
                ),
            }
        )
    return {
        "sets": sets,
        "rows": rows,
        "runs": runs,
        "steps": steps,
        "guidance": guidance,
        "device": backbone.device.type,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions("torch", "diffusers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _timed(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def show(facts: dict[str, Any]) -> None:
    """The figures as a table, and what they were measured on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{facts['rows']} sources, {facts['steps']} steps, guidance {facts['guidance']:g};"
        f" median of {facts['runs']} runs"
    )
    for name in ("", "calls", "rows through the model", "seconds", "from – to", "aligned faster"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for case in facts["sets"]:
        table.add_section()
        table.add_row("r = " + ", ".join(f"{ratio:g}" for ratio in case["ratios"]), style="bold")
        for name, way in case["ways"].items():
            table.add_row(
                f"  {name}",
                str(way["calls"]),
                str(way["model_rows"]),
                f"{way['seconds']:.3f}",
                f"{way['fastest']:.3f} – {way['slowest']:.3f}",
                f"{case['faster']:.2f} ×" if name == "aligned" else "",
            )
    console = Console(width=110)
    console.print(table)
    libraries = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.print(
        f"{facts['device']}, threads: {facts['threads']}; {facts['hardware']}; {libraries}", highlight=False
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(genie)
