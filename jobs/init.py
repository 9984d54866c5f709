"""`seedloom init FOLDER`: a config to start from, and reference drawings for the embedded backbone."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

TEMPLATES = ("few_shot", "long_tail", "hard_negatives", "minority", "rare_concepts", "mixed")


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    template: Annotated[str, typer.Option(help=f"One of: {', '.join(TEMPLATES)}.")] = "few_shot",
) -> None:
    """Write FOLDER/dataset.yaml and FOLDER/references/, ready for `seedloom build`."""
    from jobs.tangram.drawings import CLASSES, COUNTS, write_references
    from schemas.errors import UserError

    if template not in TEMPLATES:
        raise UserError(f"--template {template!r}: allowed are {', '.join(TEMPLATES)}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give a new one")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; give a new folder")
    text = files("jobs").joinpath(f"configs/{template}.yaml").read_text()
    rarest = sorted(CLASSES, key=lambda c: COUNTS[c])
    classes = dict.fromkeys(rarest[:4], 6)
    if template == "long_tail":
        classes |= dict.fromkeys(rarest[-4:], 30)
    elif template == "hard_negatives":
        classes = dict.fromkeys(("hexagon", "octagon", "five_pointed_star", "six_pointed_star"), 8)
    for label, count in classes.items():
        write_references(folder / "references", [label], per_class=count, rng_seed=0)
    config = folder / "dataset.yaml"
    for there, here in (("./references", "references"), (f"./out/{template}", "out")):
        text = text.replace(there, json.dumps(f"{folder}/{here}", ensure_ascii=False))
    config.write_text(text)
    print(f"{config}\n{folder}/references\n\nnext: seedloom build {config}")


if __name__ == "__main__":
    from jobs.entry import run

    run(init)
