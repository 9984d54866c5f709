"""Chaos: a build whose processes are killed and whose store fails, in every phase, until it is through.

    python -m tests.chaos --runs 20 --folder /tmp/chaos        # prints a line for each run, and the tally

A run is one output and a list of orders, drawn from the run's seed: at the n-th write of a phase the process
that writes, the driver, or both end by SIGKILL, or the store raises. Orders lie as files in a folder, and a
process claims one by linking it, so that each strikes once. The output is a small tmpfs that runs full. After
each end the same command is run again. A reference kills each worker that inverts it, and a candidate each
worker that draws it, in the calm build as well; at the end the shards and the manifest must be its, hash for
hash.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.store import Store
from stages.contract import Backbone, Inverted
from stages.invert.ddim import DdimInversion
from tests.ray_build import Driver, await_end_of_all, noise_sha256, packed, short_folder, users_of
from tests.small_build import fraction, make_config

ORDERS = "SEEDLOOM_TEST_ORDERS"  # the folder of the orders; without it nothing happens
PHASES = {
    "invert": r"seeds/",
    "prepare": r"artifacts/",
    "generate": r"parts/",
    "score": r"scores/",
    "index": r"index/",
    "pack": r"builds/.*/shards/",
    "manifest": r"builds/.*/manifest\.json|history/|latest\.json",
}
# before: nothing is written yet; torn: the scratch file is, under no name; after: all is, and nobody knows
MOMENTS = ("before", "torn", "after")
VICTIMS = ("writer", "driver", "both")
NTH = {"invert": 3, "prepare": 1, "generate": 40, "score": 40, "index": 2, "pack": 8, "manifest": 1}
SMALL_DISK = 10  # MiB; the build needs more
LARGE_DISK = 200
TRIES = 60  # of the command, before a run is given up


class FatalInversion(DdimInversion):
    """DDIM inversion that ends its process, each time, where it meets one image."""

    class Config(DdimInversion.Config):
        method: str  # type: ignore[assignment]
        fatal: float  # of the image: a number that its pixels decide

    def __call__(self, backbone: Backbone, image_B3hw: Tensor, prompt: str) -> Inverted:
        for row in image_B3hw:
            if fraction(row.cpu().contiguous().numpy().tobytes()) == self.config.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(backbone, image_B3hw, prompt)


# --- in the processes of the build -------------------------------------------------------------------------


def _strike(moment: str, name: str) -> None:
    """Carry out the orders that this moment of this write fulfils."""
    folder = Path(os.environ[ORDERS])
    for path in sorted(folder.glob("*.order")):
        try:
            order = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            continue
        if order["moment"] != moment or not re.match(order["name"], name):
            continue
        (folder / f"{path.stem}.seen").mkdir(exist_ok=True)
        (folder / f"{path.stem}.seen" / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        if len(list((folder / f"{path.stem}.seen").iterdir())) < order["nth"]:
            continue
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.rename(path, folder / f"{path.stem}.done")  # whoever succeeds carries it out
            with (folder / "log").open("a") as log:
                log.write(f"{order['phase']} {order['kind']} {moment} {name}\n")
            match order["kind"]:
                case "error":
                    raise OSError(errno.EIO, "an injected fault of the store", name)
                case "driver" | "both":
                    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                        os.kill(int((folder / "driver").read_text()), signal.SIGKILL)
            if order["kind"] in ("writer", "both"):
                os.kill(os.getpid(), signal.SIGKILL)


def _install() -> None:
    put_new, put, scratch = Store.put_new, Store.put, Store._scratch
    writing = threading.local()

    def struck_put_new(self: Store, name: str, *data: Any) -> bool:
        _strike("before", name)
        writing.name = name
        wrote = put_new(self, name, *data)
        _strike("after", name)
        return wrote

    def struck_put(self: Store, name: str, *data: Any) -> None:
        _strike("before", name)
        writing.name = name
        put(self, name, *data)
        _strike("after", name)

    def struck_scratch(self: Store, *data: Any) -> Path:
        path = scratch(self, *data)
        _strike("torn", writing.name)
        return path

    Store.put_new, Store.put = struck_put_new, struck_put  # type: ignore[method-assign]
    Store._scratch = struck_scratch  # type: ignore[method-assign]


if os.environ.get(ORDERS):  # this module is imported where its inversion is looked up: driver and workers
    _install()


# --- outside of them ---------------------------------------------------------------------------------------


def chaos_config(folder: Path, references: Path, log: Path, output: Path) -> Path:
    """Some 2,100 candidates: from noise with a fatal one, from seeds, and from seeds with an artifact."""
    from stages.images import decode, to_tensor

    first = sorted((references / "gear").iterdir())[0]
    fatal = fraction(to_tensor(decode(first.read_bytes()), 64).contiguous().numpy().tobytes())
    invert = {"method": "tests.chaos:FatalInversion", "steps": 4, "fatal": fatal}
    draw = {"method": "text_to_image", "steps": 4, "guidance": 1}
    noise = {
        "method": "tests.ray_build:Traced", "steps": 4, "guidance": 1, "log": str(log),
        "traps": {noise_sha256("circle", "noise", 5): "kill"},
    }  # fmt: skip
    blur = {"method": "direction", "edit": "blur"}
    return make_config(
        folder,
        references,
        output=str(output),
        recipes={
            "noise": {"generate": noise},
            "mixed": {"invert": invert, "combine": {"method": "cog"}, "generate": draw},
            "edited": {"invert": invert, "combine": blur, "generate": draw},
        },
        targets=[
            {"classes": ["circle"], "accepted": 900, "attempts": 2, "recipe": "noise", "filter": []},
            {"classes": ["gear"], "accepted": 400, "attempts": 4, "recipe": "mixed"},
            {"classes": ["ring"], "accepted": 300, "attempts": 4, "recipe": "edited"},
        ],
        filter=[{"method": "tests.small_build:HashFilter", "least": 0.4}],
        shard={"samples": 100, "window": 2},
        run={"runner": "ray", "workers": 3},
    )


def orders(seed: int) -> list[dict[str, Any]]:
    """Of every phase a kill of each sort in turn, and faults of the store, at moments that the seed draws."""
    chance = random.Random(seed)
    drawn = []
    for number, (phase, name) in enumerate(PHASES.items()):
        kinds = [VICTIMS[(seed + number) % 3], "error"]
        if phase in ("generate", "score", "pack"):
            kinds += list(VICTIMS)
        for kind in kinds:
            moment, nth = chance.choice(MOMENTS), chance.randint(1, NTH[phase])
            drawn.append({"phase": phase, "kind": kind, "moment": moment, "name": name, "nth": nth})
    return drawn


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A tmpfs that is too small at first."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def run(
    seed: int, folder: Path, references: Path, log: Path
) -> tuple[dict[str, str], list[str], Counter[str]]:
    """One run: what is packed at the end, what struck, and how the command ended, how often."""
    place = folder / "orders"
    place.mkdir(parents=True)
    for number, order in enumerate(orders(seed)):
        (place / f"{number:02d}.order").write_text(json.dumps(order))
    ends: Counter[str] = Counter()
    with disk(folder / "disk") as output, short_folder() as ray_folder:
        path = chaos_config(folder, references, log, output / "out")
        for _ in range(TRIES):
            driver = Driver(path, ray_folder, **{ORDERS: str(place)})
            (place / "driver").write_text(str(driver.process.pid))
            code, _, err = driver.end()
            for pid in users_of(ray_folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await_end_of_all(ray_folder)
            if "No space left" in err:
                code = "disk full"
                resize = f"remount,size={LARGE_DISK}m"
                subprocess.run(["mount", "-o", resize, "tmpfs", folder / "disk"], check=True)
            ends[str(code)] += 1
            if code == 0:
                struck = (place / "log").read_text().splitlines()
                for sort in ("error", "writer driver both"):
                    missed = set(PHASES) - {
                        p for p, kind, *_ in map(str.split, struck) if kind in sort.split()
                    }
                    assert not missed, f"run {seed}: no {sort} in the phases {missed}"
                return packed(output / "out"), struck, ends
    raise AssertionError(f"run {seed}: not through after {TRIES} tries: {dict(ends)}\n{err[-3000:]}")


def calm(folder: Path, references: Path, log: Path) -> dict[str, str]:
    """The same build, left alone."""
    with short_folder() as ray_folder:
        code, _, err = Driver(chaos_config(folder, references, log, folder / "out"), ray_folder).end()
        assert code == 0, err
        await_end_of_all(ray_folder)
    return packed(folder / "out")


def main() -> None:
    from jobs.tangram.drawings import write_references
    from tests.small_build import CLASSES

    parser = argparse.ArgumentParser(description="Builds under chaos, and their tally.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first run")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    references = given.folder / "references"
    if not references.exists():
        write_references(references, CLASSES, per_class=4)
    log = given.folder / "log"
    expected = calm(given.folder / "calm", references, log)
    tally: Counter[str] = Counter()
    same = 0
    for seed in range(given.first, given.first + given.runs):
        started = time.monotonic()
        found, struck, ends = run(seed, given.folder / f"run-{seed}", references, log)
        shutil.rmtree(given.folder / f"run-{seed}" / "disk", ignore_errors=True)
        same += found == expected
        tally.update(" ".join(line.split()[:2]) for line in struck)
        print(
            f"run {seed}: {'the same' if found == expected else 'OTHER BYTES'}; {len(struck)} strikes;"
            f" the command ended {dict(ends)}; {time.monotonic() - started:.0f} s",
            flush=True,
        )
    print(f"\n{same} of {given.runs} runs gave the bytes of the calm build ({len(expected)} files)")
    for name, count in sorted(tally.items()):
        print(f"{count:5}  {name}")


if __name__ == "__main__":
    main()
