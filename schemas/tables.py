"""The Arrow schemas of everything that is written as Parquet. Changing one raises its version."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from schemas.errors import UserError

VERSION = 4

# How a candidate came to be: the same columns in a part and beside a shard.
_RECIPE = [
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("parents", pa.list_(pa.string()), nullable=False),  # sha256 of the references whose seeds
    pa.field("weights", pa.list_(pa.float64()), nullable=False),  # were combined, and their weights
    pa.field("combined_norm", pa.float64()),  # |z| / √d of the combined seed, before it was refined
    pa.field("parents_cosine", pa.float64()),  # of the combined seeds, mean over pairs; 0: independent
    pa.field("artifacts", pa.list_(pa.string()), nullable=False),  # hashes of what was made for the class
    pa.field("refine_losses", pa.list_(pa.float64()), nullable=False),
    pa.field("source", pa.string()),  # sha256 of the image that it started from
    pa.field("source_class", pa.string()),
    pa.field("noise_ratio", pa.float64()),  # r: share of the sampler's steps that drew it, from that image
    pa.field("generate_trace", pa.list_(pa.float64()), nullable=False),  # by what generating decided
    pa.field("seed_sha256", pa.string()),  # of the float32 bytes of z_T, C-order
    pa.field("seed_norm", pa.float64()),  # |z_T| / √d
]

_IMAGE = [
    pa.field("image_sha256", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
]

PART = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),  # the candidate's number in its stream
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "ok" or "failed"
        pa.field("error", pa.string()),
        *_RECIPE,
        *_IMAGE,
        pa.field("image", pa.binary()),  # encoded; null when failed
    ]
)


def refuse_newer(schema: pa.Schema, name: str) -> None:
    """Raises `UserError` for a table of a newer format; `name` is what the message calls it."""
    if (version := json.loads(schema.metadata[b"version"])) > VERSION:
        raise UserError(f"{name}: written by a newer seedloom (format {version}); upgrade to read it")


def score_name(filter_name: str, column: str) -> str:
    """The column of a score beside a shard: "clip_margin"; dots would nest in some readers.

    A measure whose only column is called as it is does not say it twice: "clip_score".
    """
    name = filter_name.replace(":", "_").replace(".", "_")
    return name if column == name else f"{name}_{column}"


# By what filters compare candidates with each other.
SIGNATURE = {"hash": pa.int64(), "embedding": pa.list_(pa.float32())}


def scores(columns: Sequence[str], signature: bool = False) -> pa.Schema:
    """Scores of a part by one filter, with a signature if it has one: null for failed candidates."""
    return pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            *[pa.field(column, pa.float64()) for column in columns],
            *[pa.field(name, kind) for name, kind in SIGNATURE.items() if signature],
        ]
    )


def samples(score_names: Sequence[str]) -> pa.Schema:
    """One row for each sample of a shard: what it is, how it came to be, and where its bytes lie."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("class", pa.string(), nullable=False),
            pa.field("class_index", pa.int32(), nullable=False),
            pa.field("recipe", pa.string(), nullable=False),
            pa.field("stream", pa.string(), nullable=False),  # fingerprint: the folder of its part
            pa.field("unit", pa.int64(), nullable=False),
            pa.field("index", pa.int64(), nullable=False),
            *_RECIPE,
            *[pa.field(name, pa.float64()) for name in sorted(score_names)],
            *_IMAGE,
            pa.field("shard", pa.string(), nullable=False),  # "000123": of 000123.tar
            pa.field("member", pa.string(), nullable=False),  # name in the tar
            pa.field("offset", pa.int64(), nullable=False),  # of the image's first byte in the tar
            pa.field("length", pa.int64(), nullable=False),  # bytes
        ]
    )


_NAME = pa.dictionary(pa.int32(), pa.string())  # few different ones

INDEX = pa.schema(
    [
        pa.field("scope", _NAME, nullable=False),  # fingerprint of the stream and of all that decides on it
        pa.field("unit", pa.int64(), nullable=False),
        pa.field("environment", _NAME, nullable=False),  # of its part, canonical JSON
        # of each candidate: "passed", "failed", or the rule that rejected it
        pa.field("outcomes", pa.list_(pa.field("element", _NAME, nullable=False)), nullable=False),
    ]
)
