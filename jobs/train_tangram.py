"""`seedloom train-tangram`: draw the pictures, train the parts of the embedded backbone, evaluate them.

Each part is trained by itself and keeps a checkpoint under OUT/checkpoints, so parts may run in separate
processes, be killed, and be started again. Only the diffusion part needs another one, the finished VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jobs.tangram import PARTS
from schemas.errors import UserError

# What learns is imported by the functions that use it, so that `seedloom --help` does not load torch.


def train(
    out: Path, parts: Sequence[str] = PARTS, *, steps: int | None = None, resume: bool = True
) -> dict[str, dict[str, float]]:
    """Train the `parts` that are not finished under `out`. Returns steps and wall seconds of each.

    `steps` replaces each part's own number; `resume=False` begins anew.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"tangram has no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    from jobs.tangram.layout import checkpoint_of
    from jobs.tangram.training import record_run, recorded_run

    runs = {}
    for part in parts:
        wanted = _own_steps(part) if steps is None else steps
        done = recorded_run(checkpoint_of(out, part)) if resume else None
        if done is None or done["steps"] < wanted:
            done = _train_part(out, part, wanted, resume)
            record_run(checkpoint_of(out, part), done)
        runs[part] = done
    return runs


def _own_steps(part: str) -> int:
    from jobs.tangram import clip, diffusion, vae
    from jobs.tangram.classifiers import PLANS

    own = {"vae": vae.SCHEDULE, "diffusion": diffusion.SCHEDULE, "clip": clip.SCHEDULE}
    return (PLANS[part].schedule if part in PLANS else own[part]).steps


def _train_part(out: Path, part: str, steps: int, resume: bool) -> dict[str, float]:
    from jobs.tangram.classifiers import PLANS, train_classifier
    from jobs.tangram.clip import train_clip
    from jobs.tangram.data import long_tail
    from jobs.tangram.diffusion import cached_latents, train_diffusion
    from jobs.tangram.layout import checkpoint_of, finished_vae
    from jobs.tangram.vae import train_vae

    checkpoint = checkpoint_of(out, part)
    if part == "vae":
        return train_vae(checkpoint, steps=steps, resume=resume)
    if part == "clip":
        return train_clip(checkpoint, steps=steps, resume=resume)
    if part in PLANS:
        return train_classifier(part, checkpoint, steps=steps, resume=resume)
    if not checkpoint_of(out, "vae").exists():
        raise UserError(f"{out} has no trained vae, from which diffusion learns: train the part vae first")
    data = long_tail()
    return train_diffusion(
        checkpoint, cached_latents(finished_vae(out), data), data, steps=steps, resume=resume
    )


def train_tangram(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the finished layout.")] = Path(
        "out/tangram"
    ),
    evaluate_only: Annotated[
        bool,
        typer.Option("--evaluate", help="Train nothing: compute the figures of the shipped weights anew."),
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help=f"Only these parts: {', '.join(PARTS)}.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, instead of each part's own number.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in OUT.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    weights: Annotated[
        Path | None, typer.Option(help="Layout to evaluate, instead of the shipped one.")
    ] = None,
) -> None:
    """Train the embedded backbone `tangram`, or evaluate it."""
    import torch

    from jobs.tangram.card import write_card
    from jobs.tangram.evaluate import evaluate, print_figures
    from jobs.tangram.layout import checkpoint_of, export
    from jobs.tangram.training import recorded_run
    from stages.backbones.weights import TANGRAM, check_sha256

    torch.set_num_threads(threads)
    if evaluate_only:
        folder = TANGRAM if weights is None else weights
        check_sha256(folder)
        print_figures(evaluate(folder))
        return
    train(out, tuple(part or PARTS), steps=steps, resume=resume)
    layout = out / "layout"
    export(out, layout)
    if all(recorded_run(checkpoint_of(out, name)) for name in PARTS):
        figures = evaluate(layout)
        write_card(layout, figures, out)
        print_figures(figures)
    typer.echo(f"written to {layout}")


if __name__ == "__main__":
    typer.run(train_tangram)
