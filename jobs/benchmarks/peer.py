"""`seedloom benchmark peer`: the whole job beside what a user would otherwise write from Ray's documentation.

Two programs make the same: so many images of each prompt, by the same backbone, steps, guidance, batch and
number of workers, in WebDataset shards of the same size. Theirs is `peer_ray_data.py`; ours is an ordinary
`seedloom build` without a filter. Both run as processes on a Ray cluster that this benchmark starts anew for
each of them and that has twice as many CPUs as workers, without which Ray Data has none left to write with.
They take turns, A B, B A, …, so that whatever else the machine does weighs on both alike.

- seconds: from the start of the process to its end; the cluster is up before.
- steady: images/s from the end of the first batch to the end of the last: without the start and the end.
- first shard: until there is a whole .tar; theirs are written while images are made, ours when all are.
- memory: the largest sum of PSS, which counts a shared page once, over the program and the whole cluster.

Then both are killed: SIGKILL to the driver when half of the images are made, and the same command at once
again on the same cluster. Counted are the samples in the shards by their keys, shards that cannot be read to
the end or decoded, and images that were made more than once. A third program takes part in this: theirs with
Ray Data's checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from jobs.benchmarks.machine import hardware, versions
from schemas.errors import UserError

ROOT = Path(__file__).parents[2]
CLASSES = ("circle", "gear", "hexagon", "ring")
PROMPT = "a photo of a {class}"
GUIDANCE = 4.0
QUALITY = 75  # of JPEG: what Ray's encoder takes
OURS, THEIRS, CHECKPOINTED = "Seedloom", "Ray Data", "Ray Data, checkpoints"
CLUSTER_SECONDS = 120.0  # to come up; it takes a few
ROLL_UP = "smaps_rollup"


@dataclass(frozen=True)
class Job:
    """What both sides are to make, and with what."""

    per_class: int
    steps: int
    batch: int
    shard: int  # samples
    workers: int
    gpus: int

    @property
    def images(self) -> int:
        return len(CLASSES) * self.per_class

    @property
    def gpus_per_worker(self) -> float:
        return min(1.0, self.gpus / self.workers)


@dataclass(frozen=True)
class Program:
    """One side in a folder of its own: its command, and where its shards appear."""

    command: list[str]
    output: Path
    pattern: str

    def shards(self) -> list[Path]:
        return sorted(self.output.glob(self.pattern))


def peer(
    per_class: Annotated[int, typer.Option(min=1, help="Images of each of the four prompts.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Of each side; 0: one for each core or GPU.")] = 0,
    turns: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 4,
    kills: Annotated[int, typer.Option(min=0, help="Killed runs of each side.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps of an image.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images in a call of the model.")] = 16,
    shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 64,
    quick: Annotated[bool, typer.Option("--quick", help="One run of each, of 64 images of 4 steps.")] = False,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("peer.json"),
) -> None:
    """Compare a build with Ray Data over diffusers: images/s, first shard, memory, and a killed driver."""
    import torch

    gpus = torch.cuda.device_count()
    workers = workers or gpus or os.cpu_count() or 1
    job = Job(per_class, steps, batch, shard, workers, gpus)
    if quick:
        job, turns, kills = Job(16, 4, 4, 16, workers, gpus), 1, 1
    if job.per_class % job.batch:
        raise UserError(
            f"--per-class {job.per_class}: must be a multiple of --batch ({job.batch}), so that all batches"
            " of both sides are full"
        )
    if not Path("/proc/self", ROLL_UP).exists():
        raise UserError("benchmark peer: memory is read from /proc, which only Linux has; run it there")
    # Ray's sockets do not fit into long names
    with tempfile.TemporaryDirectory(prefix="peer") as folder:
        facts = measure(Path(folder), job, turns, kills)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(describe(facts))
    print(f"figures: {out}")


def measure(folder: Path, job: Job, turns: int, kills: int) -> dict[str, Any]:
    """Figures of every run; each has a folder and a cluster of its own."""
    load_before = os.getloadavg()[0]
    timed: dict[str, list[dict[str, Any]]] = {THEIRS: [], OURS: []}
    for turn in range(turns):
        for name in _order(list(timed), turn):
            timed[name].append(_timed_run(folder / "run", job, name))
    killed: dict[str, list[dict[str, Any]]] = {THEIRS: [], CHECKPOINTED: [], OURS: []}
    for turn in range(kills):
        for name in _order(list(killed), turn):
            killed[name].append(_killed_run(folder / "run", job, name))
    return {
        "timed": timed,
        "killed": killed,
        "images": job.images,
        "steps": job.steps,
        "guidance": GUIDANCE,
        "batch": job.batch,
        "shard": job.shard,
        "workers": job.workers,
        "load": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "hardware": hardware(),
        "versions": versions("ray", "torch", "diffusers"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _order(names: list[str], turn: int) -> list[str]:
    return names[::-1] if turn % 2 else names


# --- the two programs --------------------------------------------------------------------------------------


def program(folder: Path, job: Job, name: str) -> Program:
    """Write what a side reads into a folder."""
    output = folder / "out"
    if name == OURS:
        path = folder / "dataset.yaml"
        path.write_text(yaml.safe_dump(_config(output, job)))
        return Program([sys.executable, "-m", "jobs.build", str(path)], output, "builds/*/shards/*.tar")
    from stages.backbones.weights import TANGRAM

    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(_rows(job)))
    arguments = {
        "--model": TANGRAM,
        "--steps": job.steps,
        "--guidance": GUIDANCE,
        "--batch": job.batch,
        "--shard": job.shard,
        "--workers": job.workers,
        "--gpus-per-worker": job.gpus_per_worker,
    }
    if name == CHECKPOINTED:
        arguments["--checkpoint"] = folder / "checkpoint"
    script = Path(__file__).with_name("peer_ray_data.py")
    command = [sys.executable, script, prompts, output, *(x for pair in arguments.items() for x in pair)]
    return Program([str(part) for part in command], output, "*.tar")


def _config(output: Path, job: Job) -> dict[str, Any]:
    return {
        "output": str(output),
        "prompt": PROMPT,
        "recipes": {
            "plain": {
                "generate": {
                    "method": "jobs.benchmarks.peer_recorded:Recorded",
                    "steps": job.steps,
                    "guidance": GUIDANCE,
                },
                "unit": job.batch,
                "batch": job.batch,
            }
        },
        "targets": [{"classes": list(CLASSES), "accepted": job.per_class}],
        "filter": [],
        "shard": {"samples": job.shard, "image": "jpeg", "quality": QUALITY},
        "run": {"runner": "ray", "workers": job.workers, "gpus_per_worker": job.gpus_per_worker or 1},
    }


def _rows(job: Job) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"{label}-{index:06d}",
            "txt": PROMPT.replace("{class}", label),
            "cls": number,
            "seed": number * job.per_class + index,
        }
        for number, label in enumerate(CLASSES)
        for index in range(job.per_class)
    ]


# --- runs --------------------------------------------------------------------------------------------------


def _timed_run(folder: Path, job: Job, name: str) -> dict[str, Any]:
    with _stage(folder, job, name) as (side, cluster, log):
        idle = cluster.memory()
        started = time.time()
        process = cluster.start(side.command)
        peak, first_shard = idle, None
        looked = 0.0
        while process.poll() is None:
            if first_shard is None and any(_whole(path) for path in side.shards()):
                first_shard = time.time() - started
            if time.time() - looked > 1:
                looked, peak = time.time(), max(peak, cluster.memory(process.pid))
            time.sleep(0.05)
        seconds = time.time() - started
        cluster.check(process)
        batches = _read(log)
        ends = sorted(when for when, _ in batches)
        first, made = min(batches, key=lambda b: b[0]), sum(len(keys) for _, keys in batches)
        return {
            "seconds": round(seconds, 2),
            "images_per_second": round(job.images / seconds, 3),
            "steady_images_per_second": round((made - len(first[1])) / (ends[-1] - ends[0]), 3),
            "first_image_seconds": round(ends[0] - started, 2),
            "first_shard_seconds": round(seconds if first_shard is None else first_shard, 2),
            "peak_gb": round(peak / 1e9, 3),
            "idle_cluster_gb": round(idle / 1e9, 3),
            **_account(side, job, batches),
        }


def _killed_run(folder: Path, job: Job, name: str) -> dict[str, Any]:
    with _stage(folder, job, name) as (side, cluster, log):
        process = cluster.start(side.command)
        while (made := sum(len(keys) for _, keys in _read(log))) < job.images / 2:
            if process.poll() is not None:
                cluster.check(process)
                raise RuntimeError(f"{name} ended before it was killed")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"{name} ended before it was killed")
        started = time.time()
        again = cluster.start(side.command)
        again.wait()
        cluster.check(again)
        return {
            "made_before_the_kill": made,
            "second_run_seconds": round(time.time() - started, 2),
            **_account(side, job, _read(log)),
        }


def _account(side: Program, job: Job, batches: list[tuple[float, list[str]]]) -> dict[str, int]:
    """What lies in the shards, and what was made."""
    found, unreadable = audit(side.shards())
    times = Counter(key for _, keys in batches for key in keys)
    return {
        "samples": found.total(),
        "duplicates": found.total() - len(found),
        "missing": job.images - len(found),
        "shards": len(side.shards()),
        "unreadable_shards": unreadable,
        "images_made": times.total(),
        "images_made_again": times.total() - len(times),
    }


def audit(shards: list[Path]) -> tuple[Counter[str], int]:
    """How often each key is in the shards with an image that decodes; and how many shards are damaged."""
    from PIL import Image

    found: Counter[str] = Counter()
    damaged = 0
    for path in shards:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    if extension == "jpg":
                        file = tar.extractfile(member)
                        Image.open(io.BytesIO(file.read() if file else b"")).load()
                        found[key] += 1
            damaged += not _whole(path)
        except (tarfile.TarError, OSError, EOFError):
            damaged += 1
    return found, damaged


def _whole(tar: Path) -> bool:
    """Whether the two empty blocks that end a tar are there."""
    with contextlib.suppress(OSError), tar.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(end - 1024, 0))
        return file.read() == bytes(1024)
    return False


def _read(log: Path) -> list[tuple[float, list[str]]]:
    """When each batch was done, and its images. A line that is still being written is left out."""
    if not log.exists():
        return []
    return [tuple(json.loads(line)) for line in log.read_text().split("\n")[:-1]]


# --- the cluster -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of this machine alone, and the programs that run on it."""

    head: subprocess.Popen[bytes]
    environment: dict[str, str]
    said: Path  # standard output and error of all
    programs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.said.open("ab") as said:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=said, stderr=said)
        self.programs.append(process)
        return process

    def check(self, process: subprocess.Popen[bytes]) -> None:
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}:\n{self.said.read_text()[-4000:]}")

    def memory(self, *others: int) -> int:
        """Bytes of PSS of the cluster and of other processes, with all that they started."""
        return sum(_pss(pid) for pid in tree(self.head.pid, *others))


@contextlib.contextmanager
def _stage(folder: Path, job: Job, name: str) -> Iterator[tuple[Program, Cluster, Path]]:
    """An empty folder, a side in it, and a cluster that is up."""
    folder.mkdir()
    try:
        log = folder / "made.jsonl"
        with _cluster(folder / "ray", job, log) as cluster:
            yield program(folder, job, name), cluster, log
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _cluster(folder: Path, job: Job, log: Path) -> Iterator[Cluster]:
    folder.mkdir()
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        port, client_port = (probe.getsockname()[1] for probe in (one, other))
    environment = {
        **os.environ,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SEEDLOOM_PEER_LOG": str(log),
    }
    options = (
        "start --head --block --node-ip-address=127.0.0.1 --include-dashboard=false --disable-usage-stats"
        f" --port={port} --ray-client-server-port={client_port} --num-cpus={2 * job.workers}"
        f" --temp-dir={folder} --object-store-memory={2**28}"
    )
    said = folder / "said"
    with said.open("wb") as file:
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *options.split()],
            env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
            stdout=file, stderr=file,
        )  # fmt: skip
    cluster = Cluster(head, environment, said)
    try:
        _await(lambda: "Ray runtime started" in said.read_text(), head, said)
        yield cluster
    finally:
        for pid in tree(head.pid, *(process.pid for process in cluster.programs)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


def _await(up: Callable[[], bool], head: subprocess.Popen[bytes], said: Path) -> None:
    end = time.time() + CLUSTER_SECONDS
    while not up():
        if head.poll() is not None or time.time() > end:
            raise RuntimeError(f"the Ray cluster did not start:\n{said.read_text()[-4000:]}")
        time.sleep(0.1)


# --- processes ---------------------------------------------------------------------------------------------


def tree(*roots: int) -> set[int]:
    """These processes and all that descend from them, of those that run."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # the name before the last bracket may hold anything; the state follows, and then the parent
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    running = {pid for found in children.values() for pid in found}
    found, ahead = set(), [pid for pid in roots if pid in running]
    while ahead:
        pid = ahead.pop()
        found.add(pid)
        ahead += children.get(pid, [])
    return found


def _pss(pid: int) -> int:
    """Bytes of memory, of shared pages this process's share; 0 for one that has just ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}", ROLL_UP).read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# --- words -------------------------------------------------------------------------------------------------

ROWS = {  # what is printed of the timed runs, and how
    "images_per_second": ("images/s, end to end", "{:.2f}"),
    "steady_images_per_second": ("images/s, first batch to last", "{:.2f}"),
    "seconds": ("seconds, end to end", "{:.1f}"),
    "first_image_seconds": ("seconds to the first batch", "{:.1f}"),
    "first_shard_seconds": ("seconds to the first shard", "{:.1f}"),
    "peak_gb": ("peak memory, GB of PSS", "{:.2f}"),
    "idle_cluster_gb": ("of it the idle cluster", "{:.2f}"),
}
COUNTS = {
    "samples": "samples in the shards",
    "duplicates": "of them duplicates",
    "missing": "missing",
    "unreadable_shards": "damaged shards",
    "images_made": "images made, both runs",
    "images_made_again": "of them again",
    "second_run_seconds": "seconds of the second run",
}


def describe(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables: median and range of each side."""
    timed, killed = facts["timed"], facts["killed"]
    lines = [
        f"{facts['images']} images of {len(CLASSES)} prompts, {facts['steps']} steps, guidance"
        f" {facts['guidance']:g}, batch {facts['batch']}, shards of {facts['shard']};"
        f" {facts['workers']} workers × 1 thread; median (range) of {len(timed[OURS])} runs of each",
        "",
        _table_line("", *timed),
        _table_line("---", *["---:"] * len(timed)),
    ]
    for key, (words, form) in ROWS.items():
        lines.append(_table_line(words, *(_spread([r[key] for r in runs], form) for runs in timed.values())))
    if killed[OURS]:
        lines += [
            "",
            f"SIGKILL to the driver when half of the images were made, and the same command again at once;"
            f" {len(killed[OURS])} runs of each",
            "",
            _table_line("", *killed),
            _table_line("---", *["---:"] * len(killed)),
        ]
        for key, words in COUNTS.items():
            lines.append(
                _table_line(words, *(_spread([r[key] for r in runs], "{:g}") for runs in killed.values()))
            )
    lines += [
        "",
        f"{facts['hardware']}; load before and after {facts['load'][0]} and {facts['load'][1]};"
        f" {', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; {facts['date']}",
    ]
    return "\n".join(lines)


def _table_line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float], form: str) -> str:
    low, high = (form.format(bound) for bound in (min(values), max(values)))
    middle = form.format(statistics.median(values))
    return middle if low == high else f"{middle} ({low} – {high})"


if __name__ == "__main__":
    from jobs.entry import run

    run(peer)
