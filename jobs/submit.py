"""`seedloom submit FILE --address URL`: a build as a job on a Ray cluster, followed to its end if asked.

What travels is code and configs: the working directory without weights, data, outputs and environments, and
seedloom itself. The exit code is that of the build, and 0 only when there is a complete manifest as well: a
job can be reported as running or succeeded when its cluster is in trouble.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.build import SHORTFALL
from jobs.entry import STOPPED
from jobs.options import ConfigFile, Json, Overrides
from schemas.errors import Interrupted, UserError

if TYPE_CHECKING:
    from pipeline.config import BuildConfig
    from schemas.manifest import Manifest

LOCK = "requirements.lock"
HOUSE = ("jobs", "pipeline", "stages", "schemas")
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 512 * 2**20  # bytes that Ray takes
SILENCE = 120.0  # seconds without an answer of the cluster, after which nobody waits any longer

# In the words of .gitignore: what is no code and no config.
EXCLUDED = """
.git/
.venv/
venv/
node_modules/
__pycache__/
.*_cache/
*.egg-info/
*.safetensors
*.ckpt
*.pt
*.pth
*.bin
*.onnx
*.npy
*.npz
*.tar
*.gz
*.zip
*.parquet
*.arrow
*.jpg
*.jpeg
*.png
*.webp
*.log
"""


class JobFailed(UserError):
    """The job did not do what it was to do."""

    def __init__(self, text: str, exit_code: int = 1):
        super().__init__(text)
        self.exit_code = exit_code


def submit(
    file: ConfigFile,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster: http://HEAD:8265.",
            show_default=False,
        ),
    ],
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="What travels, with the config somewhere inside.")
    ] = Path("."),
    install: Annotated[
        bool,
        typer.Option(
            "--install/--no-install",
            help="Whether the nodes install requirements.lock, or their image has seedloom already.",
        ),
    ] = True,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the logs and exit as the build does.")] = False,
    overrides: Overrides = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Build on a Ray cluster: `ray job submit`, with what must travel and what must not seen to.

    Exit codes with --wait are those of `seedloom build`, and 0 means that a complete manifest is there; 1 is
    a job that failed or was lost, 130 one that was stopped. Ctrl-C leaves the job at work.
    """
    from pipeline.config import load

    config = load(file, overrides or [])
    folder = working_dir.resolve()
    if not file.resolve().is_relative_to(folder):
        raise UserError(f"{file}: not inside the working directory {folder}, so it would not travel")
    demand_shared(config)
    command = ["python", "-m", "jobs.cli", "build", file.resolve().relative_to(folder).as_posix()]
    command += [part for override in overrides or () for part in ("--set", override)]
    command += ["--json"] if json else []
    installed = {"pip": requirements(ROOT / LOCK)} if install else {}
    client = _client(address)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        pack_folder(folder, package, with_house=install or folder == ROOT)
        job = _send(
            client,
            entrypoint=shlex.join(command),
            submission_id=f"seedloom-{uuid.uuid4().hex[:12]}",
            runtime_env={"working_dir": str(package), **installed},
            metadata={"dataset": config.name, "output": config.output},
        )
    print(f"job {job}: submitted to {address}", flush=True)
    hint = f"ray job logs --follow {job} --address {address}; ray job stop {job} --address {address}"
    if not wait:
        print(hint)
        return
    try:
        ended = follow(client, job)
    except KeyboardInterrupt:
        raise Interrupted(f"the job goes on; {hint}") from None
    code, text = verdict(ended, complete(config))
    if code not in (0, SHORTFALL):
        raise JobFailed(f"job {job}: {text}", code)
    print(f"job {job}: {text}")
    raise typer.Exit(code)


# --- what travels ------------------------------------------------------------------------------------------


def demand_shared(config: BuildConfig) -> None:
    """Raise `UserError` for a path that means something on this machine only."""
    places = {"output": config.output, "references.uri": getattr(config.references, "uri", None)}
    places |= {f"backbone.{key}": getattr(config.backbone, key) for key in ("model", "unet", "decoder")}
    for i, target in enumerate(config.targets):
        places[f"targets.{i}.sources.matrix"] = getattr(target.sources, "matrix", None)
    for key, place in places.items():
        if place is None or "://" in place or os.path.isabs(place):
            continue
        if key == "output" or Path(place).expanduser().exists():
            raise UserError(
                f"{key}: {place!r} is a path of this machine, and the job runs on others; give a URI such as"
                " s3://bucket/folder, or the absolute path of a folder that every node has"
            )


def files_of(folder: Path, inherited: Sequence[Any] = ()) -> Iterator[Path]:
    """The files below a folder that travel: not those that .gitignore, .rayignore or `EXCLUDED` name."""
    from pathspec import GitIgnoreSpec

    ignored = list(inherited) or [(folder, GitIgnoreSpec.from_lines(EXCLUDED.splitlines()))]
    for name in (".gitignore", ".rayignore"):
        if (folder / name).is_file():
            lines = (folder / name).read_text("utf-8").splitlines()
            ignored.append((folder, GitIgnoreSpec.from_lines(lines)))
    if (folder / "pyvenv.cfg").exists():
        return
    for path in sorted(folder.iterdir()):
        mark = "/" if path.is_dir() else ""
        if any(spec.match_file(path.relative_to(top).as_posix() + mark) for top, spec in ignored):
            continue
        if not path.is_dir():
            yield path
        elif not path.is_symlink():
            yield from files_of(path, ignored)


def pack_folder(folder: Path, package: Path, with_house: bool) -> None:
    """Write what travels as a zip, the same bytes for the same files, so that a cluster takes it once.

    `with_house` puts seedloom and its lock in, with the weights of tangram. Raises `UserError`.
    """
    chosen = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    if with_house:
        house = [ROOT / LOCK, *(p for part in HOUSE for p in (ROOT / part).rglob("*") if p.is_file())]
        chosen |= {p.relative_to(ROOT).as_posix(): p for p in house if "__pycache__" not in p.parts}
    size = 0
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(chosen):
            entry = zipfile.ZipInfo(name)  # of a fixed date
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(chosen[name], os.X_OK) else 0o644) << 16
            archive.writestr(entry, chosen[name].read_bytes())
            size += entry.compress_size
            if size > LIMIT:
                largest = sorted(chosen, key=lambda n: -chosen[n].stat().st_size)[:3]
                told = ", ".join(f"{n} ({chosen[n].stat().st_size / 2**20:.0f} MiB)" for n in largest)
                raise UserError(
                    f"{folder}: more than the {LIMIT // 2**20} MiB that Ray takes; the largest files are"
                    f" {told}; name what need not travel in .rayignore, as in a .gitignore"
                )


def requirements(lock: Path) -> dict[str, Any]:
    """A `pip` field for Ray: the lock as it travels, hashes and all."""
    from schemas.ids import sha256

    if not lock.is_file():
        raise UserError(
            f"{lock}: not there, as seedloom was installed without its repository; use --no-install on nodes"
            " whose image has seedloom"
        )
    # the comment makes another environment of another lock: Ray sees these lines alone
    lines = [f"-r ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{LOCK}", f"# {sha256(lock.read_bytes())}"]
    return {"packages": lines, "pip_check": False}


# --- the job -----------------------------------------------------------------------------------------------


def _client(address: str) -> Any:
    import logging

    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        client.get_version()
    except AuthenticationError as error:
        raise UserError(f"--address {address}: {str(error).splitlines()[0]}") from error
    except (requests.exceptions.RequestException, ConnectionError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: no Ray dashboard answers there ({type(error).__name__}); it is the address"
            " of the head's port 8265, as http://HEAD:8265"
        ) from error
    return client


def _send(client: Any, **job: Any) -> str:
    """Submit; a cluster that has only just begun may ask for another try. Raises `JobFailed`."""
    until = time.monotonic() + SILENCE
    while True:
        try:
            return str(client.submit_job(**job))
        except (RuntimeError, OSError) as error:
            if "try again later" not in str(error) or time.monotonic() > until:
                raise JobFailed(f"the cluster does not take the job: {str(error).splitlines()[0]}") from error
        time.sleep(1)


def follow(client: Any, job: str) -> Any:
    """Print the logs of a job until it has ended, and return its details. Raises `JobFailed`."""
    import aiohttp

    printed, since = 0, time.monotonic()

    async def tail() -> None:
        nonlocal printed, since
        seen = 0
        async for text in client.tail_job_logs(job):  # from the beginning, each time
            new = text[max(0, printed - seen) :]
            seen += len(text)
            printed, since = max(printed, seen), time.monotonic()
            print(new, end="", flush=True)

    while True:
        try:
            asyncio.run(tail())
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            since = time.monotonic()
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if "404" in str(error):
                raise JobFailed(
                    f"job {job}: the cluster does not know it any more, as after its head was started again;"
                    " submit once more to go on, nothing that was committed is lost"
                ) from error
            if time.monotonic() - since > SILENCE:
                raise JobFailed(
                    f"job {job}: no answer of the cluster for {SILENCE:.0f} s ({error}); the job may go on"
                ) from error
        time.sleep(1)


def complete(config: BuildConfig) -> Manifest | str:
    """The manifest of the newest complete build of this config; or why none can be seen from here."""
    from pipeline.ledger import history, named
    from pipeline.store import Store

    store = Store(config.output)
    if store.local and not Path(store.root).exists():
        return f"{config.output} is not on this machine"
    try:
        for entry in reversed(history(store)):
            if _same(config, store, entry["build_id"]):
                return named(store, entry["build_id"])
    except (UserError, OSError) as error:
        return str(error)
    return ""


def _same(config: BuildConfig, store: Any, build: str) -> bool:
    """Whether a build was made from this config, with the references that it had then."""
    import yaml

    from pipeline.goals import settle
    from pipeline.references import Lock

    folder = f"builds/{build}"
    try:
        kept = yaml.safe_load(store.get(f"{folder}/config.yaml"))
        lock = Lock.from_bytes(store.get(f"{folder}/references.lock"), f"{folder}/references.lock")
    except FileNotFoundError:  # pruned
        return False
    asked = settle(config, lock).described()
    for name, recipe in asked["recipes"].items():
        if recipe["batch"] == "auto":
            recipe["batch"] = kept["recipes"].get(name, {}).get("batch")
    return bool(asked == kept)


def verdict(details: Any, found: Manifest | str) -> tuple[int, str]:
    """Exit code and words, from what the cluster says of the job and from what is in the output.

    `found` is the manifest, or why it cannot be seen from here; "": there is none.
    """
    status, code = str(details.status), details.driver_exit_code
    if status == "STOPPED":
        return STOPPED, "it was stopped; submit once more to go on"
    if status != "SUCCEEDED" and code != SHORTFALL:
        said = (details.message or "").strip().splitlines()
        known = code if code in (2, 4, 5, STOPPED) else 1
        return known, f"failed, exit code {code}" + (f": {said[0]}" if said else "")
    if found == "":
        return 1, f"{status.lower()}, but its output has no complete build of this config"
    if isinstance(found, str):
        return code or 0, f"{status.lower()}; whether its build is complete cannot be seen from here: {found}"
    short = f"; short by {found.shortfall}, attempts used up" if found.shortfall else ""
    text = f"build {found.build_id} is complete with {found.samples} samples{short}"
    return SHORTFALL if found.shortfall else 0, text


if __name__ == "__main__":
    from jobs.entry import run

    run(submit)
