"""References as a build sees them: the lock that names them, and copies of those that targets use.

The lock is what the build's identity covers. The bytes of used references are kept in the store by hash, so
that workers need no access to the source and any image can be made again after the source has moved on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from pipeline.config import BuildConfig, method_of
from pipeline.store import Store, side_by_side
from schemas.errors import Damaged, UserError
from schemas.ids import fingerprint, sha256
from schemas.records import Quarantined, Reference
from schemas.sealed import seal, unseal
from schemas.settings import Settings
from stages.read.admit import admit
from stages.read.settings import ReadSettings

LOCK_VERSION = 2


@dataclass(frozen=True)
class Lock:
    """The admitted references of every class in hash order, and every file that was set aside."""

    classes: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    quarantined: tuple[Quarantined, ...] = ()
    held_out: Mapping[str, Lock] = field(default_factory=dict)  # sets of filters, by `set_name`

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self._content())

    def admitted(self) -> tuple[Reference, ...]:
        """The images of all classes, each once."""
        return tuple({r.sha256: r for references in self.classes.values() for r in references}.values())

    def _content(self) -> dict[str, Any]:
        # what has no held-out sets has the same bytes as before there were any
        held_out = {name: lock._content() for name, lock in self.held_out.items()}
        return {
            **({"held_out": held_out} if held_out else {}),
            "version": LOCK_VERSION if held_out else 1,
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
        return cls._of(content)

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Lock:
        return cls(
            {label: tuple(Reference(**r) for r in refs) for label, refs in content["classes"].items()},
            tuple(Quarantined(**q) for q in content["quarantined"]),
            {name: cls._of(inner) for name, inner in content.get("held_out", {}).items()},
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


def scan_all(config: BuildConfig, store: Store) -> Lock:
    """The references of a build, with the held-out sets of its filters. Raises `UserError`."""
    held_out = {}
    for settings in held_out_sets(config):
        try:
            lock = scan(settings, store)
        except UserError as error:
            raise UserError(f"filter held_out: {error}") from error
        if not lock.classes:
            raise UserError(f"filter held_out: {settings.uri!r} has no image that can be read")
        held_out[set_name(settings)] = lock
    return replace(scan(config.references, store), held_out=held_out)


def held_out_sets(config: BuildConfig) -> list[ReadSettings]:
    """The sources of the held-out sets that filters of a config name."""
    parts: tuple[Any, ...] = (config, *config.recipes.values(), *config.targets)
    filters = [settings for part in parts for settings in part.filter or ()]
    found = [f.held_out for f in filters if method_of("filter", f).compares == "held_out"]
    return list({set_name(settings): settings for settings in found}.values())


def set_name(settings: Settings) -> str:
    """What a held-out set is called in a lock."""
    return fingerprint(settings.model_dump(mode="json"))


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
