"""The model card: what was trained on what, for how long, and the figures that came out."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from jobs.tangram import PARTS, classifiers, clip, diffusion, vae
from jobs.tangram.clip import CLASS_PROMPTS
from jobs.tangram.drawings import CLASSES, COUNTS, RARE, SIZE
from jobs.tangram.evaluate import row_of
from jobs.tangram.layout import checkpoint_of
from jobs.tangram.parts import class_scores, clip_scores, load, noise_of, paint
from jobs.tangram.training import recorded_run

SHEET = "rare_best_of_64.png"
TRIES, SHOWN = 64, 8

_INTRODUCTION = """# tangram

A small, complete latent diffusion model of drawn shapes, trained by this repository on pictures that it draws
itself (`seedloom train-tangram`). It is the backbone that needs no download. 64x64 pixels, latents 4x16x16,
fp16 safetensors, {megabytes:.1f} MB in all; `SHA256SUMS` names every file that is loaded.

VAE, UNet and text encoder learned from the **long tail** of the table below, so prompting fails on the rare
classes: that is the problem which the pipeline's methods are for. CLIP, classifier and judge learned from
balanced drawings, apart from that set and from each other. CLIP stands for a foundation model: any figure
that rests on it holds for a filter that knows the rare classes well. The judge measures and does nothing
else.

Licence: Apache-2.0, weights included. Intended for demonstrations, tests and method comparisons; it knows
nothing of real photographs.
"""


def write_card(folder: Path, results: dict[str, Any], out: Path) -> None:
    """Write README.md and the contact sheet of the rare classes into a layout trained under `out`."""
    sheet, right = best_of_sheet(folder)
    sheet.save(folder / SHEET, optimize=True)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    sections = [
        _INTRODUCTION.format(megabytes=megabytes),
        _figures(results),
        _rare(right),
        _training(out),
        _counts(results),
    ]
    (folder / "README.md").write_text("\n".join(sections))


def best_of_sheet(folder: Path) -> tuple[Image.Image, dict[str, tuple[bool, int]]]:
    """For each rare class the 8 best of 64 seeds by CLIP score, best first.

    Also returns, per class, whether the judge agrees with the best one, and with how many of the 64.
    """
    tangram = load(folder)
    cell, margin = 2 * SIZE + 4, 130
    sheet = Image.new("RGB", (margin + SHOWN * cell, len(RARE) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    right = {}
    for row, shape in enumerate(RARE):
        label = CLASSES.index(shape)
        seeds = torch.stack([noise_of(shape, index, "best_of") for index in range(TRIES)])
        pictures = paint(tangram, [CLASS_PROMPTS[label]] * TRIES, seeds)
        order = clip_scores(tangram, pictures)[:, label].argsort(descending=True)
        judged = class_scores(tangram.judge, pictures).argmax(1) == label
        right[shape] = (bool(judged[order[0]]), int(judged.sum()))
        pen.text((6, row * cell + SIZE), shape.replace("_", " "), fill="black")
        for column, number in enumerate(order[:SHOWN].tolist()):
            picture = Image.fromarray(pictures[number].permute(1, 2, 0).numpy())
            place = (margin + column * cell, row * cell)
            sheet.paste(picture.resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS), place)
    return sheet, right


def _figures(results: dict[str, Any]) -> str:
    lines = ["## Figures", "", "Computed from these files by `seedloom train-tangram --evaluate`.", ""]
    lines += ["| figure | value | 95 % interval | n | target | |", "|---|---|---|---|---|---|"]
    for name, figure in results["figures"].items():
        lines.append(f"| {name} | " + " | ".join(row_of(name, figure)) + " |")
    how = results["sampling"]
    lines += [
        "",
        f'Text-to-image: prompt "{how["prompt"]}", {how["steps"]} DDIM steps, guidance {how["guidance"]}, '
        "verdict by the judge. Intervals are Wilson's. Drawings are held out and balanced.",
        "",
    ]
    return "\n".join(lines)


def _rare(right: dict[str, tuple[bool, int]]) -> str:
    lines = [
        "## The rare classes",
        "",
        f"The {SHOWN} best of {TRIES} seeds by CLIP score, best first: in the model, but hard to reach.",
        "",
        f"![best of {TRIES} per rare class]({SHEET})",
        "",
        f"| class | training drawings | judge agrees with the best | right among {TRIES} |",
        "|---|---|---|---|",
    ]
    for shape, (best, count) in right.items():
        lines.append(f"| {shape} | {COUNTS[shape]} | {'yes' if best else 'no'} | {count} |")
    return "\n".join([*lines, ""])


def _training(out: Path) -> str:
    data = {
        "vae": f"the {sum(COUNTS.values())} long-tail drawings, turned and mirrored; batch {vae.BATCH}; "
        "seed 0",
        "diffusion": f"the same drawings, classes below {diffusion.FEW} in all four quarter turns; "
        f"batch {diffusion.BATCH}; seed 0",
        "clip": f"{clip.PER_CLASS} drawings per class; batch {clip.BATCH}; seed {clip.RNG_SEED}",
    }
    for name, plan in classifiers.PLANS.items():
        data[name] = (
            f"{plan.architecture}, {classifiers.PER_CLASS} drawings per class; "
            f"batch {classifiers.BATCH}; seed {plan.rng_seed}"
        )
    lines = ["## Training", "", "| part | data | steps | wall time |", "|---|---|---|---|"]
    for part in PARTS:
        run = recorded_run(checkpoint_of(out, part))
        assert run is not None, f"{part} was exported before its training ended"
        lines.append(f"| {part} | {data[part]} | {run['steps']:.0f} | {run['seconds'] / 60:.0f} min |")
    lines += [
        "",
        f"Hardware: {_processor()}, bf16 autocast, one thread per part (two at times for the VAE), on a "
        f"machine with other work as well; torch {torch.__version__.partition('+')[0]}. AdamW, warm-up, "
        "constant rate, linear fall over the last third; the shipped weights are the moving average.",
        "",
    ]
    return "\n".join(lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.machine()


def _counts(results: dict[str, Any]) -> str:
    lines = ["## Classes", "", "| class | training drawings | text-to-image accuracy |", "|---|---|---|"]
    for shape, count in COUNTS.items():
        lines.append(f"| {shape} | {count} | {results['per_class'][shape]:.2f} |")
    return "\n".join([*lines, ""])
