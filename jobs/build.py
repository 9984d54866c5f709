"""`seedloom build FILE`: make the dataset, finish it, extend it, or say that there is nothing to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from jobs.options import ConfigFile, Json, Overrides

SHORTFALL = 3


def build(
    file: ConfigFile,
    runner: Annotated[str | None, typer.Option(metavar="ray|local", help="Where the work runs.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N|auto", help="How many workers.")] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Make the dataset that FILE describes; run it again to finish or extend it.

    Exit codes: 0 complete, 3 complete but some quota could not be filled, 2 a mistake in what was given,
    130 stopped (run the same command again).
    """
    settings = [*(overrides or [])]
    settings += [f"run.runner={runner}"] if runner else []
    settings += [f"run.workers={workers}"] if workers else []
    from pipeline.build import build as run_build
    from pipeline.config import load
    from pipeline.telemetry import logged, telemetry

    config = load(file, settings)
    screen = telemetry("json" if json else "auto")
    try:
        with logged(screen):
            result = run_build(config, screen, make_runner)
    finally:
        screen.close()
    report(result, config.output, "json" if json else "text")
    if result.manifest.shortfall:
        raise typer.Exit(SHORTFALL)


def make_runner(plan: Any, uri: str) -> Any:
    """The runner that the config asks for; Ray is imported only when it is used."""
    if plan.config.run.runner == "local":
        from pipeline.run_local import LocalRunner

        return LocalRunner(plan, uri)
    from pipeline.run_ray import RayRunner

    return RayRunner(plan, uri)


def report(result: Any, output: str, form: Literal["text", "json"]) -> None:
    """Say what there is now and where it lies."""
    import json as json_library

    manifest = result.manifest
    folder = f"{output.rstrip('/')}/{result.folder}"
    if form == "json":
        facts = {
            "event": "complete",
            "made": result.made,
            "build": manifest.build_id,
            "samples": manifest.samples,
            "missing": manifest.shortfall,
            "folder": folder,
            "seconds": result.seconds,
            "busy_share": result.busy_share,
        }
        print(json_library.dumps(facts), flush=True)
        return
    print(f"build {manifest.build_id}: " + ("complete" if result.made else "nothing to do, it is complete"))
    for label, target in manifest.targets.items():
        for name, r in target.recipes.items():
            rules = ", ".join(f"{n} by {rule}" for rule, n in r.rejected.items())
            rejected = sum(r.rejected.values())
            line = (
                f"  {label} / {name}: {r.accepted} of {r.quota} accepted; {r.candidates} candidates ="
                f" {r.accepted} accepted + {rejected} rejected + {r.surplus} surplus + {r.failed} failed"
            )
            line += f" ({rules})" if rules else ""
            print(line + (f"; short by {r.missing}, attempts used up" if r.exhausted else ""))
    print(f"{manifest.samples} samples in {len(manifest.shards)} shards: {folder}/shards/")
    print(f"manifest: {folder}/manifest.json")


if __name__ == "__main__":
    from jobs.entry import run

    run(build)
