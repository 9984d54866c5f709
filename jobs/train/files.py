"""Files of a store as local paths: the store's own where it is local, else copies that processes share.

A copy is named by the hash of its content and gets that name only when it has been checked, so whatever lies
in the cache may be used, by any process and for any build, also when the store is gone. One process fetches a
file while the others wait for it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import filelock

from pipeline.store import Store
from schemas.errors import Damaged, UserError

BLOCK = 1 << 23  # bytes


def default_cache() -> Path:
    """Where copies of remote files are kept unless a folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seedloom"


class Files:
    """The files below a URI. May be handed to another process, which opens the store anew."""

    def __init__(self, uri: str, cache: str | Path | None = None):
        self.uri = uri
        self._store, self._opened_by = Store(uri), os.getpid()
        self.copied = cache is not None or not self._store.local
        self.cache = Path(cache) if cache is not None else default_cache()

    @property
    def store(self) -> Store:
        if self._opened_by != os.getpid():  # the clients of object stores do not survive a fork
            self._store, self._opened_by = Store(self.uri), os.getpid()
        return self._store

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_store"} | {"_opened_by": None}

    def path(self, name: str, digest: str) -> Path:
        """Where a file of the store lies on this machine; a copy is fetched first, and checked.

        `digest` is the SHA-256 of its content. A file of the store's own is not looked at. Raises `Damaged`
        when what is to be copied is missing or is not what its hash says, and `UserError`.
        """
        if not self.copied:
            return Path(self.store.path(name))
        target = self._copy(digest)
        if not target.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(f"{target}.lock")
                lock.acquire()
            except OSError as error:
                raise self._unwritable(error) from error
            try:
                if not target.exists():
                    self._fetch(name, digest, target)
            finally:
                lock.release()
        return target

    def copied_already(self, digest: str) -> bool:
        return self.copied and self._copy(digest).exists()

    def forget(self, digest: str) -> bool:
        """Remove a copy that turned out to be damaged. Returns whether there was one."""
        if not self.copied_already(digest):
            return False
        self._copy(digest).unlink(missing_ok=True)
        return True

    def _copy(self, digest: str) -> Path:
        return self.cache / digest[:2] / digest

    def _fetch(self, name: str, digest: str, target: Path) -> None:
        aside = target.with_name(f"{target.name}.part")  # one process has the lock
        store = self.store

        def copy() -> str:
            found = hashlib.sha256()
            with store.fs.open(store.path(name), "rb") as source, aside.open("wb") as file:
                while block := source.read(BLOCK):
                    found.update(block)
                    try:
                        file.write(block)
                        file.flush()
                    except OSError as error:
                        raise self._unwritable(error) from error
            return found.hexdigest()

        try:
            if store.attempt(copy, name) != digest:
                raise Damaged(f"{self.uri}/{name}: damaged (its content is not what its hash says)")
            os.replace(aside, target)
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{self.uri}/{name}: is missing") from None
        finally:
            aside.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cache {self.cache}: cannot be written ({error.strerror or error}); make room, or name another"
            " folder"
        )
