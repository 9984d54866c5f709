"""`seedloom init FOLDER`: a config to start from, and reference drawings for the embedded backbone."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

TEMPLATES = ("few_shot", "long_tail")


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
    if template == "few_shot":
        write_references(folder / "references", rarest[:4], per_class=6, rng_seed=0)
    else:
        common, rare = rarest[-4:], rarest[:4]
        write_references(folder / "references", common, per_class=30, rng_seed=0)
        write_references(folder / "references", rare, per_class=6, rng_seed=0)
    config = folder / "dataset.yaml"
    for there, here in (("./references", "references"), (f"./out/{template}", "out")):
        text = text.replace(there, json.dumps(f"{folder}/{here}", ensure_ascii=False))
    config.write_text(text)
    print(f"{config}\n{folder}/references\n\nnext: seedloom build {config}")


if __name__ == "__main__":
    from jobs.entry import run

    run(init)
