"""`seedloom benchmark all`: every benchmark of a device, one after another, into one table.

What starts no Ray: generating, GeNIe-Ada, SeedSelect, MinorityPrompt, inversion, shards, and on a CPU NAO. On
a GPU with full-size architectures and random weights, else with the embedded model. A benchmark that fails is
named in the results, and the others go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

Step = tuple[str, Callable[..., None], dict[str, Any]]


def everything(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks"),
) -> None:
    """Run every benchmark of this device and write results.md. Exit code 1 when one failed."""
    from stages.backbones.device import default_device

    failed = run_all(steps(default_device().type), out)
    if failed:
        print(f"failed: {', '.join(failed)}; see {out / 'results.md'}")
        raise typer.Exit(1)


def steps(device: str) -> list[Step]:
    """Name, command and settings of each benchmark."""
    from jobs.benchmarks.generate import generate
    from jobs.benchmarks.genie import genie
    from jobs.benchmarks.inversion import inversion
    from jobs.benchmarks.minority import minority
    from jobs.benchmarks.nao import nao
    from jobs.benchmarks.seedselect import seedselect
    from jobs.benchmarks.shards import shards

    if device == "cpu":
        return [
            ("generate", generate, {}),
            ("genie", genie, {}),
            ("seedselect", seedselect, {}),
            ("minority", minority, {}),
            ("inversion", inversion, {}),
            ("shards", shards, {}),
            ("nao", nao, {}),
        ]
    return [
        ("generate", generate, {"runs": 3}),
        ("genie", genie, {"model": "sd15", "runs": 3}),
        ("seedselect", seedselect, {"model": "sd15", "runs": 1}),
        ("minority", minority, {"model": "sd15", "runs": 2}),
        ("inversion", inversion, {"model": "sd15", "runs": 1}),
        ("shards", shards, {}),
    ]


def run_all(chosen: Sequence[Step], out: Path) -> list[str]:
    """Run them, write what they print to results.md after each, and give the names of those that failed."""
    out.mkdir(parents=True, exist_ok=True)
    sections, failed = list[str](), list[str]()
    for name, command, settings in chosen:
        print(f"{name} …", flush=True)
        begin, said = time.monotonic(), StringIO()
        try:
            with redirect_stdout(said):
                command(**settings, out=out / f"{name}.json")
            text = said.getvalue().rsplit("figures:", 1)[0].strip()
            if "\n| " not in text:  # no Markdown, as the tables of some
                text = f"```text\n{text}\n```"
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            text = f"**Failed**: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        sections.append(f"## {name}\n\n{text}\n\n{time.monotonic() - begin:.0f} s in all.\n")
        (out / "results.md").write_text("\n".join(sections))
        print(sections[-1], flush=True)
    return failed


if __name__ == "__main__":
    from jobs.entry import run

    run(everything)
