"""Identity: fingerprints of what a result depends on, and random streams derived from identity.

Everything that is named by a hash goes through `canonical`, so two equal descriptions have one name.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np


def canonical(value: Any) -> bytes:
    """JSON bytes that are equal for equal values: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256(*pieces: bytes | memoryview) -> str:
    """The hash of these bytes, one after another."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """The first 20 hex digits (80 bits) of the hash of a JSON-like description."""
    return sha256(canonical(value))[:20]


def random_stream(*identity: str | int) -> np.random.Generator:
    """A generator that depends on the whole identity, such as (rng_seed, "noise", target, recipe, i).

    Hashing keeps (0, 5) and (5, 0) apart and makes streams independent of the order of their use.
    """
    key = np.frombuffer(hashlib.sha256(canonical(list(identity))).digest()[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def slug(name: str, length: int = 40) -> str:
    """A name as part of a key or a path: ASCII letters, digits, '_' and '-' only.

    Not injective: whoever needs uniqueness appends a fingerprint.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:length] or "x"
