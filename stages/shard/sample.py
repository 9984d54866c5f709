"""The members of a sample in a shard, as WebDataset names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from schemas.ids import canonical
from stages.shard.tar import Content

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # ray.data decodes .jpg, but not .jpeg


def members(
    key: str,
    image: Content,
    format: Literal["jpeg", "png", "webp"],
    cls: int,
    text: str,
    recipe: Mapping[str, Any],
) -> dict[str, Content]:
    """{name: content}: the image byte for byte, class index, caption, and the recipe as canonical JSON.

    `datasets` guesses the columns of a dataset from its first five samples, then fails on a later number
    where it saw null or an empty list, drops a later key, and cuts 1.5 to 1 where it saw 1. So every sample
    of a dataset must have the same recipe keys and, under one key, values of one type. Raises `ValueError`
    for null and for what is empty.
    """
    _demand_values(recipe, "recipe")
    return {
        f"{key}.{EXTENSIONS[format]}": image,
        f"{key}.cls": str(cls).encode(),
        f"{key}.txt": text.encode(),
        f"{key}.json": canonical(recipe),
    }


def _demand_values(value: Any, name: str) -> None:
    if value is None or value == [] or value == () or value == {}:
        raise ValueError(f"{name} is {value!r}: a reader cannot tell its type")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _demand_values(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _demand_values(item, name)
