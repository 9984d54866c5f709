"""The weights in the box: where they are, and whether they are whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from schemas.errors import UserError

TANGRAM = Path(__file__).parent / "tangram"
SUMS = "SHA256SUMS"


def check_sha256(folder: Path) -> None:
    """Compare every file that `folder`/SHA256SUMS names; raise a UserError naming the first damaged one."""
    listing = folder / SUMS
    if not listing.is_file():
        raise UserError(f"{folder} has no {SUMS}: the weights are incomplete; check out the folder again")
    for line in listing.read_text().splitlines():
        expected, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though {SUMS} names it; check out the folder again")
        found = sha256_of(path)
        if found != expected:
            raise UserError(
                f"{path} is damaged: SHA-256 is {found[:12]}…, {SUMS} says {expected[:12]}…; "
                "check out the file again"
            )


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
