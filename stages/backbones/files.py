"""Model folders: where a model's files lie, and what identifies them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import file_digest
from pathlib import Path

from safetensors import SafetensorError, safe_open

from schemas.errors import UserError
from stages.backbones import weights

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@cache
def tangram() -> Path:
    """The folder of the embedded models, once their files are known to be whole."""
    weights.check_sha256(weights.TANGRAM)
    return weights.TANGRAM


@cache
def _file_sha256(path: Path) -> str:
    if path.suffix == ".safetensors":
        _need_whole(path)
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _need_whole(path: Path) -> None:
    """Raise `UserError` for a weights file that is cut off or no such file; only its head is read."""
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError, ValueError) as error:
        with path.open("rb") as file:
            pointer = file.read(64).startswith(b"version https://git-lfs")
        if pointer:
            raise UserError(
                f"{path} is a pointer of Git LFS in place of the weights; run `git lfs pull`"
            ) from error
        raise UserError(
            f"{path} is not a whole safetensors file ({first_line(error)}); copy or download it again"
        ) from error


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name in the folder → hash of the bytes, wherever the folder lies. A process reads each file once.

    Raises `UserError` for weights of which only a part is there.
    """
    return {file.relative_to(folder).as_posix(): _file_sha256(file) for file in sorted(files)}


def need(folder: Path, files: Iterable[str], what: str) -> None:
    """Raise `UserError` for the files that a model folder lacks."""
    if not folder.is_dir():
        raise UserError(f"{what}: there is no folder {folder}")
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return
    held = sorted(file.name for file in folder.iterdir())
    if any(name.endswith((".incomplete", ".part", ".crdownload")) for name in held):
        hint = "; a download was cut off: download it again"
    elif all(name.endswith(".safetensors") for name in missing):
        hint = only_pickled([name for name in held if name.endswith(PICKLES)]) or _holds(held)
    else:
        hint = _holds(held)
    raise UserError(f"{what}: {folder} lacks {', '.join(missing)}{hint}")


def only_pickled(names: Collection[str]) -> str:
    """What to do about weights that are pickles only, as the end of a sentence; "" where there are none."""
    if not names:
        return ""
    return (
        f"; it has {', '.join(sorted(names)[:3])}, but pickles are never read, for they can run any code:"
        " save the model again as safetensors, or give another one"
    )


def _holds(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:4]) + (", …" if len(names) > 4 else "")
    return f"; is it the right folder? It holds {shown or 'nothing'}"


@contextmanager
def told(what: str, folder: Path | None = None) -> Iterator[None]:
    """What a library says against a model, as one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        place = f" from {folder}" if folder else ""
        raise UserError(f"{what} cannot be loaded{place}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
