"""The batches of one rank, epoch after epoch, and where they stand.

The order is that of `jobs.train.epoch`, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Sampler

from jobs.train import epoch as epochs
from schemas.errors import UserError
from schemas.ids import sha256

if TYPE_CHECKING:
    from jobs.train.dataset import BuildDataset

AHEAD = 4  # threads that fetch files before they are needed


class Batches(Sampler[list[int]]):
    """The batches of one rank, as rows of the dataset, from batch `done` of `epoch` on."""

    def __init__(
        self,
        dataset: BuildDataset,
        batch_size: int,
        rank: int,
        world_size: int,
        last: epochs.Last,
        window: int,
    ):
        if batch_size < 1 or window < 1:
            raise UserError(f"loader: batch_size={batch_size}, window={window}; both must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"loader: rank={rank} of world_size={world_size}; ranks count from 0")
        if last not in ("wrap", "drop"):
            raise UserError(f"loader: last={last!r}; allowed are 'wrap' and 'drop'")
        self.dataset, self.batch_size, self.window = dataset, batch_size, window
        self.each = epochs.length(dataset.mixture.size, world_size, batch_size, last)
        if not self.each:
            raise UserError(
                f"loader: an epoch of {dataset.mixture.size} images has no batch of {batch_size} for each of"
                f" {world_size} ranks; take smaller batches, or last='wrap'"
            )
        self.plan: dict[str, int] = {"rng_seed": dataset.rng_seed, "rank": rank, "ranks": world_size}
        self.plan |= {"each": self.each, "window": window}
        self.epoch, self.done = 0, 0
        # what the state of one loader must share with that of another to go on from it
        content = [*dataset.table["key"].to_pylist(), *map(str, dataset.images_per_epoch.values())]
        self.described = {
            "build": dataset.manifest.build_id,
            "images": sha256("\n".join(content).encode()),
            "rng_seed": dataset.rng_seed,
            "world_size": world_size,
            "batch_size": batch_size,
            "last": last,
            "window": window,
        }

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return -(-self.each // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = epochs.order(self.dataset.mixture, epoch=self.epoch, **self.plan)
        first = self.done * self.batch_size
        ahead = first // self.window  # the first window of which no file was asked for
        pool = ThreadPoolExecutor(AHEAD, "fetch")
        try:
            for start in range(first, self.each, self.batch_size):
                while ahead <= start // self.window + 1:
                    for files, name, digest in self.dataset.files(rows[ahead * self.window :][: self.window]):
                        pool.submit(files.path, name, digest)  # if it fails, the batch that needs it will say
                    ahead += 1
                yield rows[start : start + self.batch_size].tolist()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class Loader(DataLoader):
    """A `DataLoader` that knows where it is: `state_dict` taken after a batch goes on with the next one.

    Iterating goes on where it stopped: in the next epoch after a whole one, in the middle of one after
    `load_state_dict` or `break`; `set_epoch` goes to the beginning of an epoch.
    """

    def __init__(self, dataset: BuildDataset, batches: Batches, **options: Any):
        self.batches = batches
        super().__init__(dataset, batch_sampler=batches, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator in place of torch's own class
        try:
            for batch in super().__iter__():
                self.batches.done += 1
                yield batch
        except UserError as error:  # from a worker it comes with the worker's traceback in its message
            raise _of_one_line(error) from None
        self.set_epoch(self.batches.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.batches.epoch, self.batches.done = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches of it that were handed out, and what they are batches of."""
        return {"epoch": self.batches.epoch, "batches": self.batches.done, "of": self.batches.described}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises `UserError` unless it is of the same images and batches."""
        for name, value in self.batches.described.items():
            if state["of"][name] != value:
                raise UserError(
                    f"the state of the loader is of {name} {state['of'][name]}, this one has {value}; open"
                    " the same dataset in the same way, or begin an epoch with set_epoch"
                )
        self.batches.epoch, self.batches.done = state["epoch"], state["batches"]


def _of_one_line(error: UserError) -> UserError:
    """The error as it was raised: torch puts the traceback of a worker before its message."""
    text = str(error).rstrip()
    return type(error)(text.splitlines()[-1].partition(": ")[2]) if text.startswith("Caught ") else error
