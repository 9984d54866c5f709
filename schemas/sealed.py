"""JSON files that notice their own damage.

A sealed file is pretty-printed JSON whose last key, `sha256`, is the hash of the canonical bytes of the
rest. Reading demands the exact bytes that writing would give, so any changed byte is found, white space too.
"""

from __future__ import annotations

import json
from typing import Any

from schemas.errors import Damaged
from schemas.ids import canonical, sha256


def seal(content: dict[str, Any]) -> bytes:
    body = {key: content[key] for key in sorted(content)}
    body["sha256"] = sha256(canonical(content))
    return (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The content of a sealed file; `name` is what an error calls it. Raises `Damaged`."""
    try:
        content = json.loads(data)
        content.pop("sha256")
        intact = seal(content) == data
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(f"{name}: damaged (its content does not match the hash that it carries)")
    return content
