"""How every command starts: a mistake of the user's ends in one line, an order to stop in a clean end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from schemas.errors import UserError

STOPPED = 130


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
    except SystemExit as stop:
        if stop.code == STOPPED:  # what typer makes of a Ctrl-C, without a word
            print("seedloom: stopped", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("seedloom: stopped", file=sys.stderr)
        sys.exit(STOPPED)
