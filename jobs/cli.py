"""The `seedloom` command. Each subcommand is a job of its own; heavy libraries are imported when one runs."""

from __future__ import annotations

import typer

from jobs import (
    build,
    diff,
    init,
    pack,
    plan,
    prune,
    reproduce,
    schedule,
    schema,
    show,
    status,
    submit,
    verify,
)
from jobs.benchmarks.everything import everything
from jobs.benchmarks.generate import generate
from jobs.benchmarks.genie import genie
from jobs.benchmarks.inversion import inversion
from jobs.benchmarks.minority import minority
from jobs.benchmarks.nao import nao
from jobs.benchmarks.overhead import overhead
from jobs.benchmarks.peer import peer
from jobs.benchmarks.scale import scale
from jobs.benchmarks.seedselect import seedselect
from jobs.benchmarks.shards import shards
from jobs.entry import guarded
from jobs.evaluate import evaluations
from jobs.report import report
from jobs.train.export import export
from jobs.train_tangram import train_tangram
from jobs.train_traversal import train_traversal

app = typer.Typer(
    help="Few real images and a diffusion model in, a dataset that trains out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init")(init.init)
app.command("plan")(plan.plan)
app.command("build")(build.build)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("verify")(verify.verify)
app.command("pack")(pack.pack)
app.command("show")(show.show)
app.command("report")(report)
app.command("reproduce")(reproduce.reproduce)
app.command("diff")(diff.diff)
app.command("prune")(prune.prune)
app.command("schedule")(schedule.schedule)
app.command("export")(export)
app.command("schema")(schema.schema)
app.command("train-tangram")(train_tangram)
app.command("train-traversal")(train_traversal)

benchmarks = typer.Typer(help="Measure what the product promises, on this machine.", no_args_is_help=True)
benchmarks.command("overhead")(overhead)
benchmarks.command("nao")(nao)
benchmarks.command("generate")(generate)
benchmarks.command("genie")(genie)
benchmarks.command("seedselect")(seedselect)
benchmarks.command("minority")(minority)
benchmarks.command("inversion")(inversion)
benchmarks.command("shards")(shards)
benchmarks.command("peer")(peer)
benchmarks.command("scale")(scale)
benchmarks.command("all")(everything)
app.add_typer(benchmarks, name="benchmark")
app.add_typer(evaluations, name="evaluate")


def main() -> None:
    """Entry point of the console script."""
    guarded(app)


if __name__ == "__main__":
    main()
