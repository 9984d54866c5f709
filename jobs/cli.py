"""The `seedloom` command. Each subcommand is a job of its own; heavy libraries are imported when one runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from jobs import build, init, pack, plan, reproduce, schema, show, status, verify
from jobs.train_tangram import train_tangram
from schemas.errors import UserError

app = typer.Typer(
    help="Few real images and a diffusion model in, a dataset that trains out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("build")(build.build)
app.command("status")(status.status)
app.command("verify")(verify.verify)
app.command("pack")(pack.pack)
app.command("show")(show.show)
app.command("reproduce")(reproduce.reproduce)
app.command("schema")(schema.schema)
app.command("train-tangram")(train_tangram)


def main() -> None:
    """Entry point of the console script."""
    guarded(app)


def run(command: Callable[..., Any]) -> None:
    """Entry point of one job as a module: `python -m jobs.build CONFIG`."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(command)
    guarded(single)


def guarded(program: Callable[..., Any]) -> None:
    """Run a program so that a person's mistake ends in one line and its exit code, without a traceback."""
    # a user's own methods are named by import path, relative to where the command is given
    sys.path.insert(0, os.getcwd())
    # a batch system that ends a job politely gets what Ctrl-C gets: a clean stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        program()
    except UserError as error:
        print(f"seedloom: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("seedloom: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
