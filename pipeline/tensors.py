"""Seeds and artifacts: safetensors objects that notice their own damage.

The file's metadata hold one entry, a JSON record of measurements and of the hash of these and the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from pipeline.store import Store
from schemas.errors import Damaged
from schemas.ids import sha256


def artifact_name(artifact: str) -> str:
    return f"artifacts/{artifact}/artifact.safetensors"


def to_safetensors(tensors: Mapping[str, Tensor], measures: Mapping[str, Any] | None = None) -> bytes:
    """Tensors with what was measured of them, as bytes."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    record: dict[str, Any] = {"measures": dict(measures or {})}
    record["sha256"] = _digest(whole, record["measures"])
    return save(whole, metadata={"record": json.dumps(record, sort_keys=True)})


def read_tensors(store: Store, name: str) -> dict[str, Tensor]:
    """The tensors of an object. Raises `FileNotFoundError` and `Damaged`."""
    return read_measured(store, name)[0]


def read_measured(store: Store, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an object and what was measured of them. Raises `FileNotFoundError` and `Damaged`."""
    data = store.get(name)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        record = json.loads(header["__metadata__"]["record"])
        intact = record["sha256"] == _digest(tensors, record["measures"])
    except Exception:  # safetensors has errors of its own; whatever it is, it is about these bytes
        intact = False
    if not intact:
        raise Damaged(f"{store.uri}/{name}: damaged; remove it and build again")
    return tensors, record["measures"]


def _digest(tensors: Mapping[str, Tensor], measures: Mapping[str, Any]) -> str:
    described = {
        name: [str(tensor.dtype), list(tensor.shape), sha256(tensor.numpy().tobytes())]
        for name, tensor in tensors.items()
    }
    return sha256(json.dumps([described, measures], sort_keys=True).encode())
