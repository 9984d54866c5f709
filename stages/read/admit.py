"""Admission: which files of a source are references, and why the others are not.

The answer depends on the set of files alone: neither on the order of their listing nor on where they lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from schemas.errors import UserError
from schemas.ids import sha256
from schemas.records import Quarantined, Reference
from stages.contract import Item
from stages.images import NotAnImage, decode
from stages.read.settings import ReadSettings

THREADS = 4  # they hide the latency of a store; more would hold more decoded images at once
CHUNK = 64  # items that wait for a thread


@dataclass(frozen=True)
class Admission:
    """Every item is in exactly one of the two: items = admitted + quarantined."""

    admitted: tuple[Reference, ...]  # by label, and within a label by hash
    quarantined: tuple[Quarantined, ...]  # by origin


def admit(items: Iterable[Item], settings: ReadSettings) -> Admission:
    """Read and decode every item once; admit of each label the first `per_class` in the order of hashes.

    Of files with equal bytes and one label, that with the least origin counts. An I/O error stops it.
    Raises `UserError` when `settings.names` speaks of a label that no item has, or when two labels would
    have one readable name.
    """
    found: dict[str, list[Reference]] = defaultdict(list)
    quarantined: list[Quarantined] = []
    labels: set[str] = set()
    for result in _examine_all(items, settings):
        labels.add(result.label)
        if isinstance(result, Reference):
            found[result.label].append(result)
        else:
            quarantined.append(result)
    _check_names(settings, labels - {""})

    admitted: list[Reference] = []
    for label in sorted(found):
        first: dict[str, str] = {}  # hash -> least origin
        for reference in sorted(found[label], key=lambda reference: (reference.sha256, reference.origin)):
            if reference.sha256 in first:
                quarantined.append(_quarantine(reference, f"duplicate of {first[reference.sha256]}"))
                continue
            if settings.per_class is None or len(first) < settings.per_class:
                admitted.append(reference)
            else:
                quarantined.append(_quarantine(reference, f"beyond per_class={settings.per_class}"))
            first[reference.sha256] = reference.origin
    quarantined.sort(key=lambda q: (q.origin, q.label))
    return Admission(tuple(admitted), tuple(quarantined))


def _examine_all(items: Iterable[Item], settings: ReadSettings) -> Iterator[Reference | Quarantined]:
    remaining = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(remaining, CHUNK)):
            yield from pool.map(lambda item: _examine(item, settings), chunk)


def _examine(item: Item, settings: ReadSettings) -> Reference | Quarantined:
    data = b""
    try:
        data = item.read()
        image = decode(data, settings.max_pixels, settings.max_bytes)
    except NotAnImage as error:
        # A source stops reading beyond the limit, so the hash of a file that is too long is not known.
        whole = 0 < len(data) <= settings.max_bytes
        return Quarantined(item.origin, item.label, str(error), sha256(data) if whole else "")
    return Reference(sha256(data), item.label, item.origin, image.width, image.height)


def _quarantine(reference: Reference, reason: str) -> Quarantined:
    return Quarantined(reference.origin, reference.label, reason, reference.sha256)


def _check_names(settings: ReadSettings, labels: set[str]) -> None:
    unknown = sorted(settings.names.keys() - labels)
    if unknown:
        raise UserError(
            f"references.names: there is no label {unknown[0]!r} in {settings.uri!r}; "
            f"its labels are {', '.join(sorted(labels))}"
        )
    readers: dict[str, str] = {}
    for label in sorted(labels):
        other = readers.setdefault(settings.readable(label), label)
        if other != label:
            raise UserError(
                f"references.names: the labels {other!r} and {label!r} "
                f"both read {settings.readable(label)!r}; give each a name of its own"
            )
