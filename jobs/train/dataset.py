"""A build as a PyTorch dataset: real and synthetic images of each class, in the shares that one asks for.

    dataset = open_dataset("my-dataset/out", real=0.5, where=pc.field("clip_margin") > 0.1, transform=augment)
    loader = dataset.loader(batch_size=64, num_workers=8)
    for epoch in range(90):
        for batch in loader:                      # batch["image"], ["label"], ["key"], ["real"]
            ...
            torch.save({"loader": loader.state_dict(), ...}, "checkpoint.pt")

Only what the manifest names is read. The Parquet beside each shard says where every image lies and what its
hash is, so no tar is searched: a subset costs nothing, an epoch goes on in its middle at once, and an image
with a changed byte is found when it is read. What an epoch holds, and in which order, is said in
`jobs.train.epoch`; every rank has as many batches as every other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch.utils.data import Dataset

from jobs.train import epoch as epochs
from jobs.train.files import Files
from jobs.train.loader import Batches, Loader
from jobs.train.ranks import rank_and_world
from jobs.train.rows import folder_of, kept_references, samples
from pipeline.ledger import named
from schemas.errors import Damaged, UserError
from schemas.ids import sha256
from schemas.manifest import Manifest
from stages.images import NotAnImage, decode

Share = float | Literal["once"]

log = logging.getLogger("seedloom")


def open_dataset(
    uri: str,
    *,
    build: str | None = None,
    where: pc.Expression | None = None,
    real: Share | Mapping[str, Share] = 0.0,
    references: str | None = None,
    transform: Callable[[Any], Any] | None = None,
    rng_seed: int = 0,
    cache: str | Path | None = None,
    damaged: Literal["raise", "skip"] = "raise",
) -> BuildDataset:
    """Open a build of the output `uri`, the newest unless `build` names one.

    where: which samples, as a pyarrow expression on the columns beside the shards, such as
        `(pc.field("recipe") == "rare") & (pc.field("clip_margin") > 0.1)`. A null compares as false.
    real: the share of real images in each class, from 0 to 1, or "once": each real image once in an epoch.
        A mapping says it for each class by name, and what it does not name has each once. A class that lacks
        the one kind has all of the other, and the log says so.
    references: a folder or URI with one subfolder of real images for each class; unless given, the references
        that the build was made from. Its classes that the build lacks are numbered after those of the build.
    transform: from an upright RGB PIL image to a tensor; unless given, uint8 of shape (3, h, w), which stands
        in one batch only with images of its own size.
    cache: folder for checked copies of the shards. Remote ones always have copies, unless given in
        ~/.cache/seedloom; local ones only when it is given.
    damaged: "skip" leaves out shards that are missing or damaged, says so once, and puts another image of the
        class in the place of one that turns out to be damaged when it is read. Under `torch.distributed` all
        processes must open the dataset together then, because they agree on what is left out.

    Raises `Damaged`, which names the shard, and `UserError`.
    """
    files = Files(uri, cache)
    manifest = named(files.store, build)
    table = samples(files, manifest, where, damaged)
    labels = list(manifest.classes)
    pictures = files
    if real != 0:
        added = kept_references(files, manifest) if references is None else folder_of(references)
        pictures = files if references is None else Files(references)
        table = pa.concat_tables([table, added])
        labels += sorted(set(pc.unique(added["class"]).to_pylist()) - set(labels))
    table = table.combine_chunks()
    label_N = pc.index_in(table["class"], pa.array(labels, pa.string())).to_numpy().astype(np.int64)
    shard_N = table["shard"].to_numpy().astype(np.int64)
    mixture = epochs.Mixture(label_N, shard_N, len(labels), _shares(real, labels))
    if not mixture.size:
        raise UserError(
            f"{uri}: no image is left of the {manifest.samples} samples of build {manifest.build_id}; loosen"
            " `where`, or ask for real images"
        )
    if rank_and_world()[0] == 0:
        _tell_lacks(mixture, labels)
    return BuildDataset(
        manifest=manifest,
        classes=tuple(labels),
        table=table,
        mixture=mixture,
        rng_seed=rng_seed,
        files=files,
        pictures=pictures,
        transform=transform,
        damaged=damaged,
    )


def _shares(real: Share | Mapping[str, Share], labels: Sequence[str]) -> dict[int, float]:
    """Class index → share of real images, without the classes that have each image once."""
    asked = real if isinstance(real, Mapping) else dict.fromkeys(labels, real)
    if unknown := sorted(asked.keys() - set(labels)):
        raise UserError(f"real: there is no class {unknown[0]!r}; the classes are {', '.join(labels)}")
    for label, share in asked.items():
        if share != "once" and (isinstance(share, str) or not 0 <= share <= 1):
            raise UserError(f"real: {share!r} for {label!r}; give a share from 0 to 1, or 'once'")
    return {labels.index(label): float(share) for label, share in asked.items() if share != "once"}


def _tell_lacks(mixture: epochs.Mixture, labels: Sequence[str]) -> None:
    """Say which classes cannot have the share that was asked for."""
    synthetic_C, real_C = mixture.synthetic_C, mixture.real_C
    mixed = {c for c, share in mixture.shares.items() if share > 0} if real_C.any() else set()
    lacks = {
        "no real images, so all are synthetic": [c for c in mixed if not real_C[c] and synthetic_C[c]],
        "no synthetic images, so all are real": [
            c for c in mixed if mixture.shares[c] < 1 and real_C[c] and not synthetic_C[c]
        ],
        "no images": [c for c in range(len(labels)) if not real_C[c] and not synthetic_C[c]],
    }
    for what, classes in lacks.items():
        if classes:
            log.warning("%d classes have %s: %s", len(classes), what, ", ".join(labels[c] for c in classes))


class BuildDataset(Dataset):
    """The images of a build, and the real ones that stand beside them, by their row in `table`.

    A row is {"image": what `transform` gives, "label": class index, "key": key of the sample, or hash or path
    of a real image, "real": bool}. `loader` deals them out in epochs; as any map-style dataset it may also be
    given to a `DataLoader` with a sampler of your own.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        classes: tuple[str, ...],
        table: pa.Table,
        mixture: epochs.Mixture,
        rng_seed: int,
        files: Files,
        pictures: Files,
        transform: Callable[[Any], Any] | None,
        damaged: str,
    ):
        self.manifest, self.classes = manifest, classes
        self.table, self.mixture = table, mixture
        self.rng_seed, self.transform, self.damaged = rng_seed, transform, damaged
        self._files, self._pictures = files, pictures
        self._bad: set[str] = set()  # files of which one image was damaged

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self._item(row)
        except Damaged as error:
            if self.damaged == "raise":
                raise
            self._complain(row, error)
        label_N = self.mixture.label_N
        others = np.flatnonzero(label_N == label_N[row])
        for other in np.roll(others, -np.searchsorted(others, row)).tolist():
            try:
                if self._file(other)[1] not in self._bad:
                    return self._item(other)
            except Damaged as error:
                self._complain(other, error)
        raise Damaged(f"{self._files.uri}: no image of class {self.classes[label_N[row]]!r} can be read")

    @property
    def images_per_epoch(self) -> dict[str, int]:
        """How many images of each class an epoch shows, repetitions counted."""
        both_C = self.mixture.synthetic_C + self.mixture.real_C
        return dict(zip(self.classes, both_C.tolist(), strict=True))

    def loader(
        self,
        batch_size: int,
        *,
        last: epochs.Last = "wrap",
        window: int = 10_000,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> Loader:
        """Batches of this rank, epoch after epoch; `options` are those of `torch.utils.data.DataLoader`.

        last: "wrap" makes the ranks equal by repeating fewer images than there are ranks, and the last batch
            may be smaller; "drop" leaves out what does not make a whole batch on each rank.
        window: images that are shuffled together; the shards of one window are read at a time.
        rank, world_size: unless given, those of `torch.distributed` when it is initialised, else RANK and
            WORLD_SIZE of the environment, else 0 of 1.
        """
        found, size = rank_and_world()
        size = size if world_size is None else world_size
        batches = Batches(self, batch_size, found if rank is None else rank, size, last, window)
        return Loader(self, batches, **options)

    def files(self, rows: np.ndarray) -> list[tuple[Files, str, str]]:
        """The files of these rows that are to be copied before they can be read."""
        if not (self._files.copied or self._pictures.copied):
            return []
        first = np.unique(self.mixture.shard_N[rows], return_index=True)[1]
        chosen = {*rows[first], *rows[self.mixture.shard_N[rows] == epochs.REAL]}
        found = {row: self._file(int(row)) for row in sorted(chosen)}
        return [(files, name, digest) for files, name, digest in found.values() if digest and files.copied]

    def _file(self, row: int) -> tuple[Files, str, str | None]:
        """The file that holds an image: where, its name, and its hash, if that is known."""
        number = int(self.mixture.shard_N[row])
        if number == epochs.REAL:
            return self._pictures, self._value(row, "file"), self._value(row, "image_sha256")
        shard = self.manifest.shards[number]
        return self._files, f"builds/{self.manifest.build_id}/shards/{shard.name}.tar", shard.tar_sha256

    def _value(self, row: int, column: str) -> Any:
        return self.table[column][row].as_py()

    def _item(self, row: int) -> dict[str, Any]:
        data = self._read(row)
        try:
            image = decode(data)
        except NotAnImage as error:
            files, name, _ = self._file(row)
            raise Damaged(f"{files.uri}/{name}: {self._value(row, 'key')} is no image ({error})") from error
        return {
            "image": _to_uint8(image) if self.transform is None else self.transform(image),
            "label": int(self.mixture.label_N[row]),
            "key": self._value(row, "key"),
            "real": bool(self.mixture.shard_N[row] == epochs.REAL),
        }

    def _read(self, row: int) -> bytes:
        """The bytes of an image, compared with its hash; a damaged copy is fetched again, once."""
        files, name, digest = self._file(row)
        try:
            if digest is None:
                return files.store.get(name)
            while True:
                with files.path(name, digest).open("rb", buffering=0) as file:
                    file.seek(self._value(row, "offset"))
                    data = file.read(self._value(row, "length"))
                if sha256(data) == self._value(row, "image_sha256"):
                    return data
                if not files.forget(digest):
                    break
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(f"{files.uri}/{name}: is missing") from None
        key = self._value(row, "key")
        raise Damaged(f"{files.uri}/{name}: damaged ({key} is not the image that was written)")

    def _complain(self, row: int, error: Damaged) -> None:
        name = self._file(row)[1]
        if name not in self._bad:
            self._bad.add(name)
            log.warning("%s; other images of the class take the place of those that it should hold", error)


def _to_uint8(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB image, (3, h, w)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
