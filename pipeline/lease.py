"""The lease: one run works at a build, and a dead run's place is taken.

    leases/<name>/<epoch>.json    put if absent: who took the lease, and when
    leases/<name>/<epoch>.beat    overwritten by its holder: a number that grows, or that it has let go

A newcomer finds the newest epoch. When its holder has let go, or is a process of this machine that is no
more, the next epoch is the newcomer's. Otherwise it watches: a beat that moves belongs to somebody alive; one
that stands still for `PATIENCE` intervals does not. Clocks of two machines are never compared. A holder that
finds an epoch after its own has been taken for dead, and stops when it asks for its next task.

The lease saves work, and nothing depends on it: even while two runs think that they hold it, every commit is
put if absent.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.store import Store
from pipeline.tasks import Receipt, Task, Work
from schemas.errors import Busy, Damaged
from schemas.sealed import seal, unseal

PATIENCE = 4  # intervals without a beat, after which a holder is taken for dead
LOOKS = 5  # at the beat, in one interval
RELEASED = "released"
PRUNE = "prune"  # the lease of whoever removes things


class Lease:
    """A lease of one name, as a context manager. Entering raises `Busy` while somebody alive holds it.

    `beside` is the name of another that nobody may hold meanwhile, such as `PRUNE`.
    """

    def __init__(self, store: Store, name: str, interval: float, beside: str | None = None):
        self.store, self.name, self.interval = store, name, interval
        self._beside = Lease(store, beside, interval) if beside else None
        self.epoch = 0
        self._lost = threading.Event()
        self._over = threading.Event()
        self._beats = 0

    def __enter__(self) -> Lease:
        while not self._take():
            pass  # another newcomer was faster: look at it
        self._beat()
        try:
            # looked at with our own in hand, so that of two who begin at once one sees the other
            if self._beside:
                self._beside.demand_free()
        except BaseException:
            self._write(RELEASED)
            raise
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if not self._lost.is_set():
            with suppress(OSError):  # whoever comes next finds a beat that stands still
                self._write(RELEASED)

    def demand_free(self) -> None:
        """Raise `Busy` while somebody alive holds it; it may take a few intervals to tell."""
        newest = self.newest()
        if newest and not self._dead(newest):
            raise Busy(
                f"{self.store.uri}: {self.name.replace('-', ' ')} is at work already,"
                f" {_who(self._holder(newest))}; wait for its end, or stop it"
            )

    def told(self) -> str | None:
        """Who took it last and has not let go, whether alive or not."""
        newest = self.newest()
        if not newest or self._read(newest) == RELEASED:
            return None
        return _who(self._holder(newest))

    def check(self) -> None:
        """Raise `Busy` when another run has taken over."""
        if self._lost.is_set():
            taker = self._holder(self.epoch + 1)
            raise Busy(
                f"{self.store.uri}: {self.name.replace('-', ' ')} was taken over {_who(taker)}, which had no"
                " sign of life of this run; it makes what is missing, nothing is lost"
            )

    def guard(self, run: Callable[[Work], None]) -> Callable[[Work], None]:
        """The same way to run work, but that nothing is begun once the lease is lost."""
        return lambda work: run(_Guarded(work, self.check))

    def _take(self) -> bool:
        self.epoch = self.newest() + 1
        self.demand_free()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        taken = seal({"started": now, "interval": self.interval, "token": uuid.uuid4().hex, **_me()})
        name = f"leases/{self.name}/{self.epoch}.json"
        # what was written, and the answer lost, is there
        return self.store.put_new(name, taken) or self.store.get(name) == taken

    def newest(self) -> int:
        """The newest epoch; 0: nobody ever held it."""
        names = (name.removesuffix(".json") for name in self.store.list(f"leases/{self.name}"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _dead(self, epoch: int) -> bool:
        seen, holder = self._read(epoch), self._holder(epoch)
        if seen == RELEASED or _gone(holder):
            return True
        for _ in range(PATIENCE * LOOKS):
            time.sleep(holder.get("interval", self.interval) / LOOKS)
            if (now := self._read(epoch)) != seen:
                return now == RELEASED
        return True

    def _keep_beating(self) -> None:
        while not self._over.wait(self.interval):
            # the store may be out of reach for a while: that is no reason to stop working
            with suppress(OSError):
                if self.store.exists(f"leases/{self.name}/{self.epoch + 1}.json"):
                    self._lost.set()
                    return
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self._write(str(self._beats))

    def _write(self, state: str) -> None:
        self.store.put(f"leases/{self.name}/{self.epoch}.beat", state.encode())

    def _read(self, epoch: int) -> str:
        try:
            return self.store.get(f"leases/{self.name}/{epoch}.beat").decode()
        except FileNotFoundError:  # it has just been taken
            return ""

    def _holder(self, epoch: int) -> dict[str, Any]:
        name = f"leases/{self.name}/{epoch}.json"
        try:
            return unseal(self.store.get(name), f"{self.store.uri}/{name}")
        except (FileNotFoundError, Damaged):
            return {}


class _Guarded:
    def __init__(self, work: Work, check: Callable[[], None]):
        self._work, self._check = work, check

    def next(self) -> Task | None:
        self._check()
        return self._work.next()

    def done(self, task: Task, receipt: Receipt) -> None:
        self._work.done(task, receipt)

    def killed(self, task: Task) -> None:
        self._work.killed(task)


def _me() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "machine": _machine(), "born": _born(os.getpid())}


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "by a run that left no name"
    return f"by process {holder['pid']} on {holder['host']} since {holder['started']}"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that is no more."""
    if not holder or holder["machine"] is None or holder["machine"] != _machine():
        return False
    return _born(holder["pid"]) != holder["born"]


def _machine() -> str | None:
    """This boot of this machine and its space of process numbers; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: int) -> str | None:
    """When a process was started, in ticks since the boot; None when there is none, or it is dead already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
