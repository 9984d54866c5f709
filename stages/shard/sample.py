"""The members of a sample in a shard, as WebDataset names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from schemas.ids import canonical

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # ray.data decodes .jpg, but not .jpeg


def members(
    key: str,
    image: bytes,
    format: Literal["jpeg", "png", "webp"],
    cls: int,
    text: str,
    recipe: Mapping[str, Any],
) -> dict[str, bytes]:
    """{name: content}: the image byte for byte, class index, caption, and the recipe as canonical JSON.

    Readers guess column types from the first samples of a shard, so every sample of a dataset must have the
    same recipe keys, and under one key values of one type, never null (test_consumers shows what happens).
    """
    return {
        f"{key}.{EXTENSIONS[format]}": image,
        f"{key}.cls": str(cls).encode(),
        f"{key}.txt": text.encode(),
        f"{key}.json": canonical(recipe),
    }
