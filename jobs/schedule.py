"""`seedloom schedule FILE --cron "0 2 * * *"`: a build at set times, by cron or by Kubernetes.

A build may be run at any time: it makes what is missing, or says that there is nothing to do and exits with
0. So what is scheduled is the build itself.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import ConfigFile
from schemas.errors import UserError

MARK = "# seedloom"


def schedule(
    file: ConfigFile,
    cron: Annotated[
        str,
        typer.Option(metavar="TIMES", help='Minute, hour, day, month, weekday: "0 2 * * *" is 2 o\'clock.'),
    ],
    install: Annotated[bool, typer.Option("--install", help="Put the line into your crontab.")] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Print a CronJob and the ConfigMap of the config instead.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(help="With --kubernetes: the image that has seedloom.", show_default=False)
    ] = None,
) -> None:
    """Print the crontab line of a scheduled build; or install it; or print it for Kubernetes."""
    from pipeline.config import load

    demand_times(cron)
    config = load(file, [])  # what cannot be built is not scheduled
    if kubernetes:
        if install:
            raise UserError(
                "--install and --kubernetes exclude each other; pipe the manifest to kubectl apply -f -"
            )
        if image is None:
            raise UserError(
                "--kubernetes needs --image: the image that has seedloom, which cluster.yaml runs too"
            )
        print(manifest(file, config.name, cron, image), end="")
        return
    line = crontab_line(file, cron)
    if install:
        write_crontab(with_line(read_crontab(), line, file))
    print(line)


def demand_times(cron: str) -> None:
    """Raise `UserError` for what is no five fields of cron."""
    from datetime import datetime

    from cronsim import CronSim, CronSimError

    try:
        if len(cron.split()) != 5:
            raise CronSimError("five fields are needed")
        next(CronSim(cron, datetime(2026, 1, 1)))
    except (CronSimError, StopIteration) as error:
        raise UserError(
            f"--cron {cron!r}: {str(error) or 'it never comes'}; allowed are minute, hour, day, month and"
            ' weekday as cron has them, such as "0 2 * * *"'
        ) from None


def crontab_line(file: Path, cron: str) -> str:
    """The line, with whole paths: cron has neither this folder nor this environment."""
    file = file.resolve()
    log = file.with_suffix(".log")
    command = shlex.join([sys.executable, "-m", "jobs.cli", "build", str(file)])
    line = f"cd {shlex.quote(str(Path.cwd()))} && {command} >> {shlex.quote(str(log))} 2>&1"
    if "\n" in line:
        raise UserError(f"{file}: crontab has no way to write a path with a line break; rename it")
    percent = line.replace("%", r"\%")  # cron takes it for a line break
    return f"{' '.join(cron.split())} {percent} {_mark(file)}"


def _mark(file: Path) -> str:
    return f"{MARK} {str(file.resolve()).replace('%', '')}"


def with_line(crontab: str, line: str, file: Path) -> str:
    """The crontab with this line in place of the one that it had for the config, or at its end."""
    others = [other for other in crontab.splitlines() if not other.endswith(_mark(file))]
    return "\n".join([*others, line]) + "\n"


def read_crontab() -> str:
    done = _crontab("-l")
    if done.returncode and "no crontab" not in done.stderr:
        raise UserError(f"crontab -l: {done.stderr.strip() or 'failed'}; nothing was changed")
    return done.stdout if done.returncode == 0 else ""


def write_crontab(text: str) -> None:
    done = _crontab("-", given=text)
    if done.returncode:
        raise UserError(f"crontab: {done.stderr.strip() or 'failed'}; nothing was changed")


def _crontab(argument: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["crontab", argument], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("there is no crontab command here; install cron, or use the printed line") from None


def manifest(file: Path, name: str, cron: str, image: str) -> str:
    """A CronJob and the ConfigMap with the config, as YAML for `kubectl apply -f -`."""
    import yaml

    job: dict[str, Any] = yaml.safe_load((files("jobs.kubernetes") / "cronjob.yaml").read_text("utf-8"))
    label = kubernetes_name(name)
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    job["metadata"]["name"] = label
    job["spec"]["schedule"] = " ".join(cron.split())
    pod["containers"][0]["image"] = image
    pod["volumes"][0]["configMap"]["name"] = f"{label}-config"
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{label}-config"},
        "data": {"dataset.yaml": file.read_text("utf-8")},
    }
    return yaml.safe_dump_all([config, job], sort_keys=False, allow_unicode=True)


def kubernetes_name(name: str) -> str:
    """A name as Kubernetes wants it: lower-case letters, digits and '-', as a CronJob at most 52 of them."""
    import re

    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:36].strip("-")
    return f"seedloom-{label}" if label else "seedloom"


if __name__ == "__main__":
    from jobs.entry import run

    run(schedule)
