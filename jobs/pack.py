"""`seedloom pack FILE`: the dataset from what was generated already, by the thresholds of FILE."""

from __future__ import annotations

import json as json_library

import typer

from jobs.build import SHORTFALL, report
from jobs.options import ConfigFile, Json, Overrides


def pack(file: ConfigFile, overrides: Overrides = None, json: Json = False) -> None:
    """Select and pack what exists; generate nothing. Says `short by n` where more would be needed."""
    from pipeline.build import Result, repack
    from pipeline.config import load
    from pipeline.telemetry import telemetry

    config = load(file, overrides or [])
    screen = telemetry("json" if json else "auto")
    try:
        result = repack(config, screen)
    finally:
        screen.close()
    if not isinstance(result, Result) and json:
        print(json_library.dumps({"event": "short", "missing": result}))
        raise typer.Exit(SHORTFALL)
    if not isinstance(result, Result):
        for label, missing in result.items():
            print(f"{label}: short by {missing}")
        print("nothing was packed; `seedloom build` generates what is missing")
        raise typer.Exit(SHORTFALL)
    report(result, config.output, "json" if json else "text")
    if result.manifest.shortfall:
        raise typer.Exit(SHORTFALL)


if __name__ == "__main__":
    from jobs.entry import run

    run(pack)
