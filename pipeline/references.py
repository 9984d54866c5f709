"""References as a build sees them: the lock that names them, and copies of those that targets use.

The lock is what the build's identity covers. The bytes of used references are kept in the store by hash, so
that workers need no access to the source and any image can be made again after the source has moved on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pipeline.config import method_of
from pipeline.store import Store, side_by_side
from schemas.errors import Damaged, UserError
from schemas.ids import fingerprint, sha256
from schemas.records import Quarantined, Reference
from schemas.sealed import seal, unseal
from stages.read.admit import admit
from stages.read.settings import ReadSettings

LOCK_VERSION = 1


@dataclass(frozen=True)
class Lock:
    """The admitted references of every class in hash order, and every file that was set aside."""

    classes: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    quarantined: tuple[Quarantined, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "version": LOCK_VERSION,
            "classes": {label: [asdict(r) for r in refs] for label, refs in self.classes.items()},
            "quarantined": [asdict(q) for q in self.quarantined],
        }

    def to_bytes(self) -> bytes:
        return seal(self._content())

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Lock:
        content = unseal(data, name)
        if content["version"] > LOCK_VERSION:
            raise UserError(
                f"{name}: written by a newer seedloom (format {content['version']}); upgrade to read it"
            )
        return cls(
            {label: tuple(Reference(**r) for r in refs) for label, refs in content["classes"].items()},
            tuple(Quarantined(**q) for q in content["quarantined"]),
        )

    def account(self) -> dict[str, dict[str, int]]:
        """Label → {"admitted": n, "quarantined": m}, for every label that was seen."""
        refused = Counter(q.label for q in self.quarantined)
        return {
            label: {"admitted": len(self.classes.get(label, ())), "quarantined": refused[label]}
            for label in sorted({*self.classes, *refused})
        }


def scan(settings: ReadSettings | None, store: Store) -> Lock:
    """Look at every file of the source; or take the lock of an earlier build when the settings say so."""
    if settings is None:
        return Lock()
    if settings.lock is not None:
        name = f"builds/{settings.lock}/references.lock"
        try:
            return Lock.from_bytes(store.get(name), name)
        except FileNotFoundError:
            known = ", ".join(store.list("builds")) or "none"
            raise UserError(
                f"references.lock: no build {settings.lock!r} in {store.uri}; builds there: {known}"
            ) from None
    try:
        admission = admit(method_of("read", settings).items(), settings)
    except OSError as error:
        raise UserError(
            f"references.uri: {settings.uri!r} cannot be read ({error}); nothing was decided about its files,"
            " run the command again when it can"
        ) from error
    classes: dict[str, list[Reference]] = {}
    for reference in admission.admitted:
        classes.setdefault(reference.label, []).append(reference)
    return Lock(
        {label: tuple(sorted(classes[label], key=lambda r: r.sha256)) for label in sorted(classes)},
        tuple(sorted(admission.quarantined, key=lambda q: (q.label, q.origin))),
    )


def reference_name(digest: str) -> str:
    return f"references/{digest[:2]}/{digest}"


def keep(settings: ReadSettings | None, store: Store, wanted: Iterable[Reference]) -> None:
    """Copy the bytes of these references into the store, unless they are there already."""
    wanted = list({r.sha256: r for r in wanted}.values())
    there = side_by_side(lambda r: store.exists(reference_name(r.sha256)), wanted)
    absent = {r.origin: r for r, exists in zip(wanted, there, strict=True) if not exists}
    if not absent:
        return
    assert settings is not None  # references come from a source
    for item in method_of("read", settings).items():
        reference = absent.pop(item.origin, None)
        if reference is None:
            continue
        data = item.read()
        if sha256(data) != reference.sha256:
            advice = "put it back or leave out references.lock" if settings.lock else "run the command again"
            raise UserError(f"reference {item.origin!r} is not the file that was admitted; {advice}")
        store.put_new(reference_name(reference.sha256), data)
    if absent:
        raise UserError(
            f"{len(absent)} locked references are neither in {store.uri} nor in the source,"
            f" the first is {next(iter(absent))!r}; bring them back or leave out references.lock"
        )


def fetch(store: Store, digest: str) -> bytes:
    """The bytes of a kept reference, checked."""
    data = store.get(reference_name(digest))
    if sha256(data) != digest:
        raise Damaged(
            f"{store.uri}/{reference_name(digest)}: damaged (its content is not what its name says)"
        )
    return data
