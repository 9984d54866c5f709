"""Admission: which files of a source are references, and why the others are not.

The answer depends on the set of files alone: neither on the order of their listing nor on where they lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
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
    sources: tuple[tuple[Reference, Callable[[], bytes]], ...]  # the admitted ones in the order of the source

    def contents(self, labels: Container[str] | None = None) -> Iterator[tuple[Reference, bytes]]:
        """The admitted references of some labels (by default of all) with their bytes, which are read again.

        One at a time, in the order of the source, which is the fastest to read. Raises `UserError` when a
        file is no longer what was admitted; an I/O error passes.
        """
        for reference, read in self.sources:
            if labels is None or reference.label in labels:
                data = read()
                if sha256(data) != reference.sha256:
                    raise UserError(
                        f"references: {reference.origin!r} changed while it was being read; "
                        "run the same command again once nothing writes to the source"
                    )
                yield reference, data


def admit(items: Iterable[Item], settings: ReadSettings) -> Admission:
    """Read and decode every item once; admit of each label the first `per_class` in the order of hashes.

    Of files with equal bytes and one label, that with the least origin counts. An I/O error stops it.
    Raises `UserError` when `settings.names` speaks of a label that no item has, or when two labels would
    have one readable name.
    """
    found: dict[str, list[tuple[Reference, Callable[[], bytes]]]] = defaultdict(list)
    quarantined: list[Quarantined] = []
    places: dict[tuple[str, str], int] = {}
    for place, (item, result) in enumerate(_examine_all(items, settings)):
        places[item.label, item.origin] = place
        if isinstance(result, Reference):
            found[item.label].append((result, item.read))
        else:
            quarantined.append(result)
    _check_names(settings, {label for label, _ in places} - {""})

    sources: list[tuple[Reference, Callable[[], bytes]]] = []
    for candidates in found.values():
        candidates.sort(key=lambda source: (source[0].sha256, source[0].origin))
        first: dict[str, str] = {}  # hash -> least origin
        for reference, read in candidates:
            if reference.sha256 in first:
                quarantined.append(_quarantine(reference, f"duplicate of {first[reference.sha256]}"))
                continue
            if settings.per_class is None or len(first) < settings.per_class:
                sources.append((reference, read))
            else:
                quarantined.append(_quarantine(reference, f"beyond per_class={settings.per_class}"))
            first[reference.sha256] = reference.origin
    return Admission(
        admitted=tuple(sorted((r for r, _ in sources), key=lambda r: (r.label, r.sha256))),
        quarantined=tuple(sorted(quarantined, key=lambda q: (q.origin, q.label))),
        sources=tuple(sorted(sources, key=lambda source: places[source[0].label, source[0].origin])),
    )


def _examine_all(
    items: Iterable[Item], settings: ReadSettings
) -> Iterator[tuple[Item, Reference | Quarantined]]:
    remaining = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(remaining, CHUNK)):
            yield from zip(chunk, pool.map(lambda item: _examine(item, settings), chunk), strict=True)


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
