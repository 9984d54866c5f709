"""References in Parquet files: a column of image bytes and a column of labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from schemas.errors import UserError
from stages import contract, registry
from stages.images import NotAnImage
from stages.read.settings import ReadSettings
from stages.read.source import find, label_of, refused

if TYPE_CHECKING:
    import pyarrow.dataset as pads


@registry.method("parquet")
class Parquet(contract.Read):
    """One item a row, in the order of file names and rows. Folders named `column=value` give columns too.

    Images are read a row group at a time, and two row groups are kept: rows are best read in order.
    """

    class Config(ReadSettings):
        kind: Literal["parquet"] = "parquet"

        image: str = "image"
        """Column of the image: binary, or a struct with a binary `bytes`, as Hugging Face writes it."""

        label: str = "label"
        """Column of the label: text or whole numbers."""

        classes: tuple[str, ...] | None = None
        """Labels by number, when the column holds numbers. By default a number is its own label."""

    config: Config

    def items(self) -> Iterator[contract.Item]:
        dataset, origins = self._open()
        rows = 0
        for fragment in sorted(dataset.get_fragments(), key=lambda fragment: fragment.path):
            groups = fragment.split_by_row_group()
            images = _recent(partial(_column, groups, dataset.schema, self.config.image))
            row = 0
            for number, group in enumerate(groups):
                for place, label in enumerate(_column(groups, dataset.schema, self.config.label, number)):
                    origin = f"{origins[fragment.path]}/{row + place:09d}"
                    yield self._item(origin, label.as_py(), partial(_read, images, number, place))
                row += group.row_groups[0].num_rows
            rows += row
        if not rows:
            raise UserError(f"references.uri: {self.config.uri!r} has no rows")

    def _open(self) -> tuple[pads.Dataset, dict[str, str]]:
        """The dataset, and {path: origin} of its files."""
        import pyarrow as pa
        import pyarrow.dataset as pads
        import pyarrow.types as types

        fs, files = find(self.config.uri, ".parquet")
        name, path = next(iter(files.items()))
        try:
            dataset = pads.dataset(
                list(files.values()),
                filesystem=fs,
                format="parquet",
                partitioning="hive",
                partition_base_dir=path.removesuffix(name),
            )
        except pa.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"references.uri: {self.config.uri!r} is no Parquet data ({reason})") from error
        schema = dataset.schema
        for setting in ("image", "label"):
            column = getattr(self.config, setting)
            if column not in schema.names:
                raise UserError(
                    f"references.{setting}: {self.config.uri!r} has no column {column!r}; "
                    f"it has {', '.join(schema.names)}"
                )
        kind = schema.field(self.config.image).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise UserError(
                f"references.image: column {self.config.image!r} holds {kind}; "
                "it must hold binary, or a struct with a binary field `bytes`"
            )
        return dataset, {path: origin for origin, path in files.items()}

    def _item(self, origin: str, label: Any, read: Callable[[], bytes]) -> contract.Item:
        try:
            return contract.Item(origin, label_of(label, self.config.classes), read)
        except NotAnImage as error:
            return contract.Item(origin, "", refused(str(error)))


def _column(groups: list[Any], schema: Any, column: str, group: int) -> Any:
    return groups[group].to_table(schema=schema, columns=[column]).column(0)


def _recent(load: Callable[[int], Any]) -> Callable[[int], Any]:
    """`load` with its last two results kept, for readers on several threads."""
    lock = Lock()
    cached = lru_cache(maxsize=2)(load)

    def get(group: int) -> Any:
        with lock:
            return cached(group)

    return get


def _read(images: Callable[[int], Any], group: int, place: int) -> bytes:
    value = images(group)[place].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise NotAnImage("no image in the row")
    return data
