"""Model folders: where a model's files lie, and what identifies them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from hashlib import file_digest
from pathlib import Path

from schemas.errors import UserError
from stages.backbones import weights


@cache
def tangram() -> Path:
    """The folder of the embedded models, once their files are known to be whole."""
    weights.check_sha256(weights.TANGRAM)
    return weights.TANGRAM


@cache
def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Name in the folder → hash of the bytes, wherever the folder lies. A process reads each file once."""
    return {file.relative_to(folder).as_posix(): _file_sha256(file) for file in sorted(files)}


def need(folder: Path, files: Iterable[str], what: str) -> None:
    """Raise `UserError` for the files that a model folder lacks."""
    if not folder.is_dir():
        raise UserError(f"{what}: there is no folder {folder}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{what}: {folder} lacks {', '.join(missing)} (weights are read as safetensors only)")


def first_line(error: BaseException) -> str:
    """What an error of a library says, short enough for one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
