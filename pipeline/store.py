"""The output store: any fsspec URI, with one promise: an object is written whole, and once.

`put_new` is put-if-absent. On local files the data goes to a temporary file on the same file system that is
linked to its final name, so no crash leaves a torn object; elsewhere it is one conditional PUT, which
s3fs and others send for `mode="create"`. A store that cannot do it is refused by `probe`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SCRATCH = ".tmp"
SCRATCH_SECONDS = 24 * 3600
THREADS = 32  # that wait for a store, side by side


def side_by_side(call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results of calls that mostly wait for a store, in the order of the items."""
    rest = iter(items)
    with ThreadPoolExecutor(THREADS) as threads:
        while some := list(islice(rest, 64 * THREADS)):
            yield from threads.map(call, some)


@dataclass(frozen=True)
class Stored:
    """An object as a listing tells of it."""

    name: str
    size: int  # bytes
    changed: float | None  # seconds since 1970, where the store says


class Store:
    """Objects below one URI, by relative path with forward slashes."""

    def __init__(self, uri: str):
        self.uri = uri
        try:
            self.fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(f"output {uri!r}: not a usable URI ({error})") from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def probe(self) -> None:
        """Check that the store can be written and honours put-if-absent. Raises `UserError`."""
        name = f"{_SCRATCH}/probe-{uuid.uuid4().hex}"
        try:
            honoured = self.put_new(name, b"1") and not self.put_new(name, b"2") and self.get(name) == b"1"
            self.fs.rm(self.path(name))
            self._sweep()
            if self.local:  # a build that is refused later leaves no empty folders behind
                for folder in (self.path(_SCRATCH), self.root):
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
        except (
            TypeError,
            ValueError,
            NotImplementedError,
        ):  # it does not know `mode`, or cannot write at all
            honoured = False
        except Exception as error:  # stores have errors of their own, such as botocore's
            raise UserError(
                f"output {self.uri!r}: cannot be written ({_reason(error)}); choose one that you may write"
            ) from error
        if not honoured:
            raise UserError(
                f"output {self.uri!r}: the store has no conditional writes; use one that has them"
            )

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises `FileNotFoundError`."""
        try:
            return self.fs.cat_file(self.path(name))
        except NotADirectoryError as error:  # a file stands where a folder should: nothing is there either
            raise FileNotFoundError(self.path(name)) from error

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        return self.fs.cat_file(self.path(name), start=offset, end=offset + length)

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def put_new(self, name: str, *pieces: bytes | memoryview) -> bool:
        """Write an object of these pieces unless it exists. Returns whether this call wrote it."""
        if self.local:
            with self._room():
                return self._link_new(Path(self.path(name)), pieces)
        try:
            self.fs.pipe_file(self.path(name), b"".join(pieces), mode="create")
        except FileExistsError:
            return False
        return True

    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing an older one. For hints and logs only, never for data."""
        if not self.local:
            self.fs.pipe_file(self.path(name), data)
            return
        target = Path(self.path(name))
        with self._room():
            scratch = self._scratch([data])
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch, target)
            _sync_folder(target.parent)

    def list(self, folder: str) -> Iterator[str]:
        """Names of the objects directly in a folder, without the folder; nothing when there is none."""
        try:
            # refresh: another process may have written since fsspec last looked
            found = self.fs.ls(self.path(folder), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        except TypeError:  # file systems without a listing cache do not take `refresh`
            found = self.fs.ls(self.path(folder), detail=False)
        yield from sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def walk(self, folder: str) -> Iterator[Stored]:
        """Every object below a folder, at any depth; nothing when there is none."""
        # refresh: another process may have written since fsspec last looked
        found = self.fs.find(self.path(folder), detail=True, **({} if self.local else {"refresh": True}))
        for path, facts in sorted(found.items()):
            times = (facts[key] for key in ("mtime", "LastModified", "created") if key in facts)
            changed = next(times, None)
            if isinstance(changed, datetime):
                changed = changed.timestamp()
            yield Stored(path.removeprefix(self.root).lstrip("/"), int(facts["size"]), changed)

    def remove(self, name: str) -> None:
        """Remove an object, and on local files the folders that are empty then."""
        self.fs.rm_file(self.path(name))
        if self.local:
            with contextlib.suppress(OSError):
                for parent in Path(name).parents[:-1]:
                    os.rmdir(self.path(str(parent)))

    def _link_new(self, target: Path, pieces: Sequence[bytes | memoryview]) -> bool:
        if target.exists():
            return False
        scratch = self._scratch(pieces)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(scratch, target)
        except FileExistsError:
            return False
        finally:
            scratch.unlink()
        _sync_folder(target.parent)
        return True

    def _scratch(self, pieces: Sequence[bytes | memoryview]) -> Path:
        path = Path(self.root, _SCRATCH, f"{os.getpid()}-{uuid.uuid4().hex}")
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                break
            except FileNotFoundError:  # another process's probe removed the empty folder just then
                continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink()
            raise
        return path

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"output {self.uri!r}: {_reason(error)}; make room and run the same command again,"
                " nothing is lost"
            ) from error

    def _sweep(self) -> None:
        """Remove what killed processes left half-written, once it is too old to be anybody's work."""
        if self.local:
            for path in Path(self.root, _SCRATCH).glob("*"):
                with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                    if time.time() - path.stat().st_mtime > SCRATCH_SECONDS:
                        path.unlink()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
