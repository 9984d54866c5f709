"""What every source of references has in its settings."""

from __future__ import annotations

from pydantic import Field

from schemas.settings import Settings
from stages.images import MAX_BYTES, MAX_PIXELS, PILLOW_LIMIT


class ReadSettings(Settings):
    uri: str = Field(min_length=1)
    """Where the references lie: a local path or any fsspec URI (s3://, gs://, https://, ...)."""

    per_class: int | None = Field(default=None, ge=1)
    """At most so many references a class: the first in the order of their hashes. By default all."""

    names: dict[str, str] = Field(default={})
    """Label in the data -> name that people and prompts read. By default the label, with '_' as spaces."""

    lock: str | None = None
    """The id of an earlier build, whose references are used again."""

    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=PILLOW_LIMIT)
    """An image with more pixels (width x height) is quarantined before it is decoded."""

    max_bytes: int = Field(default=MAX_BYTES, ge=1)
    """A file with more bytes is quarantined; no more than this is read of it."""

    def readable(self, label: str) -> str:
        """The name that people and prompts read."""
        return self.names.get(label, label.replace("_", " "))
