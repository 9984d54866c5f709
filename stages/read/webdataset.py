"""References in WebDataset tars: the members KEY.jpg and KEY.cls (or .txt, .json) make one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from pydantic import model_validator

from schemas.errors import UserError
from stages import contract, registry
from stages.images import NotAnImage
from stages.read.settings import ReadSettings
from stages.read.source import find, label_of, printable, refused

LABEL_BYTES = 1 << 20  # a label, or the JSON that holds it, is never longer


@dataclass
class Sample:
    """What one key of a tar has: where its images lie, and its label as stored."""

    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> offset, length in the tar
    label: bytes | None = None


@registry.method("webdataset")
class WebDataset(contract.Read):
    """One item a sample, in the order of tar names and keys.

    Listing a tar reads its headers and labels; an image is read later and alone, from its offset.
    """

    class Config(ReadSettings):
        kind: Literal["webdataset"] = "webdataset"

        image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
        """Extensions of the image, the first that a sample has. What follows the first dot of a name."""

        label: Literal["cls", "txt", "json"] = "cls"
        """Extension of the label."""

        json_key: str | None = None
        """Key of the label in the JSON: with `label: json`."""

        classes: tuple[str, ...] | None = None
        """Labels by number, when the tars hold numbers. By default a number is its own label."""

        @model_validator(mode="after")
        def _json_has_a_key(self) -> WebDataset.Config:
            if (self.label == "json") != (self.json_key is not None):
                raise ValueError("json_key belongs to label: json, which needs it")
            return self

    config: Config

    def items(self) -> Iterator[contract.Item]:
        fs, tars = find(self.config.uri, ".tar")
        found = False
        for name, path in tars.items():
            for key, sample in sorted(self._samples(fs, path).items()):
                found = found or bool(sample.images)
                yield self._item(fs, path, f"{name}/{printable(key)}", sample)
        if not found:
            raise UserError(
                f"references.uri: {self.config.uri!r} has no sample with an image "
                f"(references.image: {', '.join(self.config.image)})"
            )

    def _samples(self, fs: Any, path: str) -> dict[str, Sample]:
        """{key: sample} of one tar. Raises `UserError` when the tar is damaged or cut off."""
        samples: dict[str, Sample] = {}
        with fs.open(path, "rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        if member.isreg():
                            self._add(samples, tar, member, path)
                    end = tar.offset
            except tarfile.TarError as error:
                raise UserError(
                    f"references.uri: {path!r} is no complete, uncompressed tar file ({error})"
                ) from error
            # tarfile takes any block that is no header for the end; only a block of zeros is one.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"references.uri: {path!r} is damaged or cut off at byte {end}")
        return samples

    def _add(
        self, samples: dict[str, Sample], tar: tarfile.TarFile, member: tarfile.TarInfo, path: str
    ) -> None:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot:
            return  # no sample's member, or a dot-file
        sample = samples.setdefault(folder + slash + stem, Sample())
        if extension == self.config.label:
            duplicate = sample.label is not None
            content = tar.extractfile(member)
            assert content is not None  # a regular file
            sample.label = content.read(LABEL_BYTES)
        elif extension in self.config.image:
            duplicate = extension in sample.images
            sample.images[extension] = (member.offset_data, member.size)
        else:
            return
        if duplicate:
            raise UserError(f"references.uri: {path!r} has the member {member.name!r} twice")

    def _item(self, fs: Any, path: str, origin: str, sample: Sample) -> contract.Item:
        extension = next((e for e in self.config.image if e in sample.images), None)
        if extension is not None:
            origin += f".{extension}"
        try:
            label = self._label(sample.label)
        except NotAnImage as error:
            return contract.Item(origin, "", refused(str(error)))
        if extension is None:
            return contract.Item(origin, label, refused("no image in the sample"))
        offset, length = sample.images[extension]
        read = partial(_read, fs, path, offset, min(length, self.config.max_bytes + 1))
        return contract.Item(origin, label, read)

    def _label(self, data: bytes | None) -> str:
        if data is None:
            raise NotAnImage(f"no label: the sample has no .{self.config.label}")
        text = data.decode("utf-8", "backslashreplace")
        if self.config.json_key is None:
            return label_of(text, self.config.classes)
        try:
            return label_of(json.loads(text)[self.config.json_key], self.config.classes)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise NotAnImage(f"no label: the JSON has no key {self.config.json_key!r}") from error


def _read(fs: Any, path: str, offset: int, length: int) -> bytes:
    with fs.open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)
