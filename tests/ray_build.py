"""A build for the tests of runners: every outcome occurs, more than 200 images, seconds on one core.

Besides the config: methods that leave a trace of who ran them or that go wrong on purpose, a Ray instance for
tests, and the command line as a process that can be watched, stopped and killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from schemas.ids import random_stream, sha256
from stages.contract import Backbone, Generated, Models, Order, Question
from stages.generate.text_to_image import TextToImage
from tests.small_build import HashFilter, make_config

ROOT = Path(__file__).parents[1]
DEADLINE = 240.0  # seconds for what takes a few on an idle machine


def full_config(folder: Path, references: Path, log: Path, trap: str | None = None, **overrides: Any) -> Path:
    """Three targets: one with all but candidate 5, one with rejects, one whose attempts do not suffice."""
    draw = {"method": "text_to_image", "steps": 2, "guidance": 1}
    seeds = {"invert": {"method": "ddim", "steps": 2}, "combine": {"method": "cog"}}
    traps = {noise_sha256("circle", "noise", 5): trap} if trap else {}
    content: dict[str, Any] = {
        "recipes": {
            "noise": {
                "generate": {
                    "method": "tests.ray_build:Traced", "steps": 2, "guidance": 1,
                    "log": str(log), "traps": traps,
                }
            },
            "mixed": {**seeds, "generate": draw},
            "refined": {
                **seeds,
                "refine": {"method": "seedselect", "iterations": 1},
                "generate": {**draw, "steps": 3},
            },
        },
        "targets": [
            {"classes": ["circle"], "accepted": 120, "attempts": 2, "recipe": "noise", "filter": []},
            {"classes": ["gear"], "accepted": 80, "attempts": 4, "recipe": "mixed"},
            {"classes": ["ring"], "accepted": 40, "attempts": 1, "recipe": "refined"},
        ],
        "filter": [{"method": "tests.small_build:HashFilter", "least": 0.4}],
        "shard": {"samples": 20, "window": 2},
    }  # fmt: skip
    return make_config(folder, references, **content | overrides)


def small_config(folder: Path, log: Path, traps: Mapping[str, str] | None = None, **overrides: Any) -> Path:
    """One class from noise: 12 accepted images in units of 4."""
    generate = {
        "method": "tests.ray_build:Traced", "steps": 1, "guidance": 1,
        "log": str(log), "traps": dict(traps or {}),
    }  # fmt: skip
    content: dict[str, Any] = {
        "recipes": {"noise": {"generate": generate, "unit": 4, "batch": 2}},
        "targets": [{"classes": ["circle"], "accepted": 12, "attempts": 2}],
        "filter": [],
    }
    return make_config(folder, **content | overrides)


def noise_sha256(label: str, recipe: str, index: int, rng_seed: int = 1) -> str:
    """The hash of the random seed of a candidate of tangram."""
    stream = random_stream(rng_seed, "noise", label, recipe, index)
    return sha256(stream.standard_normal((4, 16, 16), dtype=np.float32).tobytes())


def trace(folder: Path, event: str) -> int:
    """Leave a file that says that this process did something; returns how often it was done by now."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{event}-{os.getpid()}-{uuid.uuid4().hex}").touch()
    return len(list(folder.glob(f"{event}-*")))


def traced(folder: Path, event: str) -> list[int]:
    """The process of each time that an event was traced."""
    return [int(path.name.split("-")[1]) for path in folder.glob(f"{event}-*")]


class Traced(TextToImage):
    """Text-to-image that traces its calls and goes wrong, as told, where it meets certain seeds.

    raise: an exception, each time. once: an exception, the first time. kill: the end of the process, each
    time, unless the file `harmless` lies in the log folder. hang: no end. hang once: no end, the first time.
    """

    class Config(TextToImage.Config):
        method: str  # type: ignore[assignment]
        log: str
        traps: dict[str, str]

    def __init__(self, config: Config):
        super().__init__(config)
        fragile = Path(config.log) / "fragile-but-in"  # the one process in which loading works at once
        if (
            fragile.exists()
            and int(fragile.read_text()) != os.getpid()
            and trace(fragile.parent, "load") == 1
        ):
            raise ArithmeticError("cannot load")

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        log = Path(self.config.log)
        trace(log, "generate")
        for row in order.z_BCHW:
            match self.config.traps.get(sha256(row.contiguous().numpy().tobytes())):
                case "raise":
                    trace(log, "raise")
                    raise ArithmeticError("trapped")
                case "once" if trace(log, "once") == 1:
                    raise ArithmeticError("trapped once")
                case "hang" | "hang once" as told if trace(log, "hang") == 1 or told == "hang":
                    threading.Event().wait()
                case "kill" if not (log / "harmless").exists():
                    trace(log, "kill")
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(backbone, models, order)


class Placed(Traced):
    """Leaves word of its node and of the GPUs that it sees; having drawn something, it waits for `go`.

    So a test can do what it likes to a cluster in the middle of a build.
    """

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        import ray

        log, node = Path(self.config.log), ""
        if ray.is_initialized():
            node = ray.get_runtime_context().get_node_id()
        made = super().__call__(backbone, models, order)
        place = log / "places" / str(os.getpid())
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"{node} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        await_that((log / "go").exists, "the word to go on")
        return made


class Breaking(HashFilter):
    """A filter that raises whenever it scores; `times` of them, or always."""

    class Config(HashFilter.Config):
        log: str
        times: int = 1_000_000

    def score(self, models: Models, image_B3hw: Tensor, question: Question) -> dict[str, list[float]]:
        if trace(Path(self.config.log), "break") <= self.config.times:
            raise ArithmeticError("broken on purpose")
        return super().score(models, image_B3hw, question)


# --- building ----------------------------------------------------------------------------------------------


def run_build(path: Path, **run: Any) -> Any:
    """Build in this process; keywords are settings of `run`."""
    from jobs.build import make_runner
    from pipeline.build import build
    from pipeline.config import load
    from pipeline.telemetry import telemetry

    torch.set_num_threads(1)
    config = load(path, [f"run.{key}={value}" for key, value in run.items()])
    return build(config, telemetry("plain"), make_runner)


def packed(output: Path) -> dict[str, str]:
    """Every shard file and the manifest of the one build of an output, by what the disk holds."""
    (folder,) = (output / "builds").iterdir()
    files = [folder / "manifest.json", *(folder / "shards").iterdir()]
    return {path.name: sha256(path.read_bytes()) for path in files}


def run_json(output: Path) -> dict[str, Any]:
    (folder,) = (output / "builds").iterdir()
    return json.loads((folder / "run.json").read_bytes())


# --- Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_instance() -> Iterator[str]:
    """A Ray instance of two pretended cores that this process is connected to. Gives its address."""
    import ray

    with short_folder() as folder:
        started = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder))
        yield started.address_info["gcs_address"]
        ray.shutdown()
        await_end_of_all(folder)


@contextlib.contextmanager
def ray_cluster() -> Iterator[tuple[Any, Path]]:
    """A cluster on this machine that a test adds nodes to, the first of them its head; and its folder."""
    from ray.cluster_utils import Cluster

    with short_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))  # or whoever starts Ray here would join it
        cluster = Cluster()
        try:
            yield cluster, folder
        finally:
            cluster.shutdown()
            await_end_of_all(folder)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Ray's files: its sockets do not fit into the long names that pytest gives."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    try:
        yield folder
    finally:
        for pid in users_of(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def users_of(folder: Path) -> list[int]:
    """Processes that have a file below a folder open, as all of Ray's have their logs; not this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = [os.readlink(link) for link in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(f.startswith(f"{folder}/") for f in files):
                found.append(int(process.name))
    return found


def await_end_of_all(folder: Path) -> None:
    await_that(lambda: not users_of(folder), "the end of every process of a Ray instance")


def await_that(holds: Callable[[], Any], what: str, pause: float = 0.05) -> Any:
    """Poll until something holds, and return it; fails after the deadline."""
    end = time.monotonic() + DEADLINE
    while not (value := holds()):
        assert time.monotonic() < end, f"{what}: not within {DEADLINE:.0f} s"
        time.sleep(pause)
    return value


class Driver:
    """`python -m jobs.build` in a session of its own, with its output in files of Ray's folder."""

    def __init__(self, path: Path, ray_folder: Path, *arguments: str, cwd: Path = ROOT, **environment: str):
        self.out, self.err = (ray_folder / f"{uuid.uuid4().hex}.{end}" for end in ("out", "err"))
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.build", str(path), *arguments],
                cwd=cwd, env={**os.environ, "RAY_TMPDIR": str(ray_folder), **environment},
                stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def when(self, event: Callable[[], Any], what: str) -> None:
        """Wait for an event while the process runs."""

        def seen() -> bool:
            if event():
                return True
            assert self.process.poll() is None, f"the build ended before {what}:\n{self.err.read_text()}"
            return False

        await_that(seen, what, pause=0.01)

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        return self.process.wait(timeout=DEADLINE), self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
