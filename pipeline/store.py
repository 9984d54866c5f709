"""The output store: any fsspec URI, with one promise: an object is written whole, and once.

`put_new` is put-if-absent. On local files the data goes to a temporary file on the same file system that is
linked to its final name, so no crash leaves a torn object; elsewhere it is one conditional PUT, which
s3fs and others send for `mode="create"`, of large objects in parts that become one object at the end. A store
that cannot do it is refused by `probe`. Nothing is ever renamed there, and no listing is cached.

A remote store may fail for a moment: what its client has tried a few times in vain is tried again, with ever
longer pauses drawn by chance, until `GIVE_UP` seconds are over. What will not change (no access, no such
bucket, a request that makes no sense) is one line at once. A write whose answer was lost is tried again,
finds the object there, and says that it did not write it: so whoever must know that he was the first writes
something that nobody else would, and looks.
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
import tenacity
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import UserError

GIVE_UP = 90.0  # seconds
GIVE_UP_AT_ONCE = 10.0  # of a store that has never answered: it may be the wrong address
FINAL = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    UserError,
)
FINAL_ERRNO = tuple(
    getattr(errno, name)
    for name in ("EINVAL", "EPERM", "EACCES", "ENOSYS", "EMSGSIZE", "ENAMETOOLONG", "EREMCHG", "EROFS")
    if hasattr(errno, name)
)
Item = TypeVar("Item")
Result = TypeVar("Result")

_SCRATCH = ".tmp"
SCRATCH_SECONDS = 24 * 3600
THREADS = 32  # that wait for a store, side by side


def side_by_side(
    call: Callable[[Item], Result], items: Iterable[Item], at_once: int = 64 * THREADS
) -> Iterator[Result]:
    """The results of calls that mostly wait for a store, in the order of the items; so many are kept."""
    rest = iter(items)
    with ThreadPoolExecutor(THREADS) as threads:
        while some := list(islice(rest, at_once)):
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
            self.fs, root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise UserError(f"output {uri!r}: not a usable URI ({error})") from error
        self.root = root.rstrip("/")
        self.retries = 0  # of operations, beside those of the client
        self._answered = False
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

    def attempt(self, step: Callable[[], Result], name: str = "") -> Result:
        """The result of an operation on the store. Raises what tells of the object, and `UserError`."""
        if self.local:
            return step()
        patience = GIVE_UP if self._answered else GIVE_UP_AT_ONCE
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(passing),
            stop=tenacity.stop_after_delay(patience),
            wait=tenacity.wait_random_exponential(0.2, max=15),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            result = retrying(step)
            self._answered = True
            return result
        except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
            self._answered = True
            raise  # whoever asked knows what that means
        except Exception as error:
            if _of_content(error):
                raise
            what = f"{self.uri}/{name}".rstrip("/")
            if passing(error):
                raise UserError(
                    f"{what}: no answer for {patience:.0f} s ({_reason(error)}); run the same command again"
                    " when the store can be reached, nothing is lost"
                ) from error
            raise UserError(
                f"{what}: the store refuses ({_reason(error)}); check the address, the credentials and"
                " what they may do"
            ) from error

    def _count(self, state: tenacity.RetryCallState) -> None:
        self.retries += 1

    def get(self, name: str) -> bytes:
        """The bytes of an object. Raises `FileNotFoundError`."""
        try:
            return self.attempt(lambda: self.fs.cat_file(self.path(name)), name)
        except NotADirectoryError as error:  # a file stands where a folder should: nothing is there either
            raise FileNotFoundError(self.path(name)) from error

    def get_range(self, name: str, offset: int, length: int) -> bytes:
        start, end = offset, offset + length
        return self.attempt(lambda: self.fs.cat_file(self.path(name), start=start, end=end), name)

    def exists(self, name: str) -> bool:
        try:
            # `exists` of fsspec takes every failure for an absence
            return bool(self.attempt(lambda: self.fs.info(self.path(name)), name))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def put_new(self, name: str, *pieces: bytes | memoryview) -> bool:
        """Write an object of these pieces unless it exists. Returns whether this call wrote it."""
        if self.local:
            with self._room():
                return self._link_new(Path(self.path(name)), pieces)
        data = b"".join(pieces)
        try:
            self._write(lambda: self.fs.pipe_file(self.path(name), data, mode="create"), name)
        except FileExistsError:
            return False
        return True

    def put(self, name: str, data: bytes) -> None:
        """Write an object, replacing an older one. For hints and logs only, never for data."""
        if not self.local:
            self._write(lambda: self.fs.pipe_file(self.path(name), data), name)
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
            found = self.attempt(lambda: self.fs.ls(self.path(folder), detail=False), folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def walk(self, folder: str) -> Iterator[Stored]:
        """Every object below a folder, at any depth; nothing when there is none."""
        found = self.attempt(lambda: self.fs.find(self.path(folder), detail=True), folder)
        for path, facts in sorted(found.items()):
            times = (facts[key] for key in ("mtime", "LastModified", "created") if key in facts)
            changed = next(times, None)
            if isinstance(changed, datetime):
                changed = changed.timestamp()
            yield Stored(path.removeprefix(self.root).lstrip("/"), int(facts["size"]), changed)

    def remove(self, name: str) -> None:
        """Remove an object, and on local files the folders that are empty then."""
        self.attempt(lambda: self.fs.rm_file(self.path(name)), name)
        if self.local:
            with contextlib.suppress(OSError):
                for parent in Path(name).parents[:-1]:
                    os.rmdir(self.path(str(parent)))

    def _write(self, step: Callable[[], None], name: str) -> None:
        try:
            self.attempt(step, name)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.uri}: there is no such place to write to ({_reason(error)}); create the bucket, or"
                " name another output"
            ) from error

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


def passing(error: BaseException) -> bool:
    """Whether a failure of a remote store may be over when it is asked again.

    What is not known to be final is worth another try: stores have errors of their own for a lost connection.
    """
    if isinstance(error, FINAL) or not isinstance(error, Exception) or _of_content(error):
        return False
    if "Credentials" in type(error).__name__:
        return False
    return getattr(error, "errno", None) not in FINAL_ERRNO


def _of_content(error: BaseException) -> bool:
    """Whether it is about what was read, or how it was asked, and not about the store.

    What pyarrow raises for damage has no errno; what has one is trouble of the store.
    """
    own = isinstance(error, (TypeError, ValueError, NotImplementedError, UserError))
    return own or (type(error) is OSError and error.errno is None)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
