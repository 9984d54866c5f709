"""What the sources share: listing files under a URI, and saying what is wrong with it in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn

from schemas.errors import UserError
from stages.images import NotAnImage

WILDCARDS = "*?[{"


def open_uri(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI, and the path in it. Raises `UserError` for an unknown protocol."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:  # unknown protocol; known, but its package is not installed
        raise UserError(f"references.uri: {uri!r} cannot be opened ({error})") from error
    return fs, path.rstrip("/")


def walk(fs: Any, root: str) -> Iterator[tuple[str, Literal["file", "folder", "other"]]]:
    """Everything below a folder, as (path relative to it, kind), without dot-files and dot-folders.

    Links are followed. "other" is what cannot be read as a file: a broken link, a socket, a link to a folder
    that holds it. Unlike `fs.find` on local files it does not pass over a folder that may not be read.
    """
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(fs, LocalFileSystem):
        yield from _walk_local(root, "")
        return
    for path, info in fs.find(root, withdirs=True, detail=True).items():
        name = path.removeprefix(root).strip("/")
        if name and not any(part.startswith(".") for part in name.split("/")):
            yield name, "folder" if info["type"] == "directory" else "file"


def _walk_local(root: str, folder: str) -> Iterator[tuple[str, Literal["file", "folder", "other"]]]:
    with os.scandir(f"{root}/{folder}") as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = folder + entry.name
            if entry.is_file():
                yield name, "file"
            elif not entry.is_dir() or (entry.is_symlink() and _holds_itself(entry.path)):
                yield name, "other"
            else:
                yield name, "folder"
                yield from _walk_local(root, f"{name}/")


def _holds_itself(link: str) -> bool:
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(link))]) == target


def find(uri: str, suffix: str) -> tuple[Any, dict[str, str]]:
    """The files that a URI names: one file, a folder's files that end in `suffix`, a glob, {a,b} or {00..99}.

    Returns the file system and {origin: path} in the order of the origins. An origin is the path below the
    folder, or below the part of the pattern that has no wildcard, so moving the root does not change it.
    Raises `UserError` when nothing is there.
    """
    fs, path = open_uri(uri)
    if any(character in path for character in WILDCARDS):
        root = path[: min(path.index(c) for c in WILDCARDS if c in path)].rpartition("/")[0]
        names = [p.removeprefix(root).strip("/") for p in _expand(fs, path)]
    elif fs.isdir(path):
        root = path
        names = [name for name, kind in walk(fs, path) if kind == "file" and name.endswith(suffix)]
    elif fs.exists(path):
        root, _, name = path.rpartition("/")
        names = [name]
    else:
        raise UserError(
            f"references.uri: {uri!r} does not exist; give a {suffix} file, a folder or a pattern"
        )
    if not names:
        raise UserError(f"references.uri: {uri!r} holds no {suffix} file")
    return fs, {printable(name): f"{root}/{name}" if root else name for name in sorted(set(names))}


def _expand(fs: Any, pattern: str) -> list[str]:
    """The files of a pattern. A name without wildcards that came from braces must exist."""
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"references.uri: {pattern!r} has an unbalanced brace") from error
    paths: list[str] = []
    for name in names:
        if any(character in name for character in "*?["):
            paths += [path for path in fs.glob(name) if fs.isfile(path)]
        elif fs.isfile(name):
            paths.append(name)
        else:
            raise UserError(f"references.uri: {name!r}, which {pattern!r} names, does not exist")
    return paths


def printable(name: str) -> str:
    """A file name as text that can be stored: a byte that is not UTF-8 becomes \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def refused(reason: str) -> Callable[[], bytes]:
    """The `read` of an item that is no usable reference for a reason known without its bytes."""

    def read() -> NoReturn:
        raise NotAnImage(reason)

    return read


def label_of(value: Any, classes: Sequence[str] | None) -> str:
    """A label as text; a number counts into `classes` if they are given. Raises `NotAnImage` without one."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "":
        raise NotAnImage("no label")
    if classes is None:
        if isinstance(value, str | int):
            return str(value)
        raise NotAnImage(f"the label is neither text nor a whole number but {type(value).__name__}")
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(classes):
        raise NotAnImage(f"the label {value!r} is no number from 0 to {len(classes) - 1} of `classes`")
    return classes[number]
