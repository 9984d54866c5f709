"""Command-line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="The YAML config of the dataset.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as rng_seed=3. May be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
Uri = Annotated[str, typer.Argument(metavar="URI", help="The output folder or URI of a build.")]
BuildId = Annotated[
    str | None, typer.Option("--build", metavar="ID", help="A build of the output; by default the newest.")
]
