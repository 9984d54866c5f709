"""References in a Hugging Face dataset: a hub id, a folder of files, or what `save_to_disk` wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from schemas.errors import UserError
from stages import contract, registry
from stages.images import NotAnImage
from stages.read.settings import ReadSettings
from stages.read.source import label_of, open_uri, refused


@registry.method("huggingface")
class HuggingFace(contract.Read):
    """One item a row, in the order of the rows. The files' own bytes are read, never encoded again."""

    class Config(ReadSettings):
        kind: Literal["huggingface"] = "huggingface"

        name: str | None = None
        """Which configuration of the dataset, when it has several."""

        split: str = "train"

        revision: str | None = None
        """Commit, branch or tag on the hub. Give a commit: a branch may move between two builds."""

        image: str = "image"
        """Column of the image."""

        label: str = "label"
        """Column of the label: class labels, text or whole numbers."""

    config: Config

    def items(self) -> Iterator[contract.Item]:
        import datasets

        table = self._load()
        for setting in ("image", "label"):
            column = getattr(self.config, setting)
            if column not in table.column_names:
                raise UserError(
                    f"references.{setting}: {self.config.uri!r} has no column {column!r}; "
                    f"it has {', '.join(table.column_names)}"
                )
        if not len(table):
            raise UserError(f"references.uri: split {self.config.split!r} of {self.config.uri!r} has no rows")
        if isinstance(table.features[self.config.image], datasets.Image):
            table = table.cast_column(self.config.image, datasets.Image(decode=False))
        feature = table.features[self.config.label]
        classes = feature.names if isinstance(feature, datasets.ClassLabel) else None
        images = table.select_columns([self.config.image])
        for row, value in enumerate(table.select_columns([self.config.label])):
            origin = f"{self.config.split}/{row:09d}"
            try:
                label = label_of(value[self.config.label], classes)
            except NotAnImage as error:
                yield contract.Item(origin, "", refused(str(error)))
                continue
            read = partial(_read, images, self.config.image, row, self.config.max_bytes)
            yield contract.Item(origin, label, read)

    def _load(self) -> Any:
        import datasets

        uri, split = self.config.uri, self.config.split
        allowed = "give what save_to_disk wrote, a folder of image or Parquet files, or a hub id"
        fs, path = open_uri(uri) if "://" in uri else open_uri(os.path.abspath(os.path.expanduser(uri)))
        try:
            if any(fs.exists(f"{path}/{name}") for name in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(uri if "://" in uri else path)
                if isinstance(saved, datasets.DatasetDict):
                    if split not in saved:
                        raise UserError(
                            f"references.split: {uri!r} has no split {split!r}; it has {', '.join(saved)}"
                        )
                    saved = saved[split]
                return saved
            if "://" in uri or (not fs.exists(path) and uri.startswith((".", "/", "~"))):
                raise UserError(f"references.uri: {uri!r} holds no dataset; {allowed}")
            local = path if fs.exists(path) else uri
            return datasets.load_dataset(local, self.config.name, split=split, revision=self.config.revision)
        # Not found or no files; an unknown split or configuration; a hub id and no hub.
        except (FileNotFoundError, ValueError, ConnectionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"references.uri: {uri!r} cannot be loaded ({reason}); {allowed}") from error


def _read(images: Any, column: str, row: int, max_bytes: int) -> bytes:
    value = images[row][column]
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path"):
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return file.read(max_bytes + 1)  # one byte too many is enough for it to be refused
    if data is None:
        raise NotAnImage("no image in the row")
    return data
