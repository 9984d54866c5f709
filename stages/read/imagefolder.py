"""References in folders: URI/<class>/<any folders>/<file>."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from schemas.errors import UserError
from stages import contract, registry
from stages.read.settings import ReadSettings
from stages.read.source import open_uri, printable, refused, walk


@registry.method("imagefolder")
class ImageFolder(contract.Read):
    """One item for every file that is no dot-file, whatever its name ends in: decoding tells what it is."""

    class Config(ReadSettings):
        kind: Literal["imagefolder"] = "imagefolder"

    config: Config

    def items(self) -> Iterator[contract.Item]:
        uri = self.config.uri
        fs, root = open_uri(uri)
        wanted = "give a folder with one subfolder of images for each class"
        if not fs.isdir(root):
            state = "is not a folder" if fs.exists(root) else "does not exist"
            raise UserError(f"references.uri: {uri!r} {state}; {wanted}")
        kinds = dict(walk(fs, root))
        names = sorted(name for name, kind in kinds.items() if kind != "folder")
        if not any("/" in name for name in names):
            raise UserError(f"references.uri: {uri!r} has no images in subfolders; {wanted}")
        filled = {name.split("/")[0] for name in names}
        empty = sorted(name for name in kinds if "/" not in name and name not in filled)
        if empty:
            raise UserError(
                f"references.uri: the class folder {printable(empty[0])!r} in {uri!r} has no files; "
                "put images into it or remove it"
            )
        for name in names:
            origin = printable(name)
            if "/" not in name:
                yield contract.Item(origin, "", refused("not inside a class folder"))
            elif kinds[name] == "other":
                yield contract.Item(
                    origin, origin.split("/")[0], refused("not a file (broken link or device)")
                )
            else:
                read = partial(_read, fs, f"{root}/{name}", self.config.max_bytes)
                yield contract.Item(origin, origin.split("/")[0], read)


def _read(fs: Any, path: str, max_bytes: int) -> bytes:
    with fs.open(path, "rb") as file:
        return file.read(max_bytes + 1)  # one byte too many is enough for it to be refused
