"""Candidates compared with each other: which are duplicates of what, decided in the order of acceptance.

The accepted images of a target are put in one order: that of its slots (`pipeline.select.slots`), each
filled by the next candidate of its recipe that passes. A candidate that is too near to a reference, or to an
image of an earlier slot, is rejected, and the next one takes its turn. So verdicts depend neither on the
order in which units come back nor on their number, and a larger quota leaves them as they are (unless it
gives a recipe of several, whose attempts were used up, some more).

A unit that is not known yet stops the search at the first slot that waits for it. Until it is known the
candidates behind it count as passed, which is the best case by which `Stream.needed` asks for units; so here,
too, no unit is made in vain.

The signatures of all candidates of such targets are kept in memory, 4 bytes for each of E features, and each
candidate is compared with all that were accepted before: meant for up to some 10^5 images a target.

Shape letters: N images, E features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.plan import FilterPlan, Plan, StreamPlan
from pipeline.select import PASSED, Selection, Signatures, Stream, slots
from pipeline.store import Store
from pipeline.tensors import artifact_name, read_tensors
from schemas.ids import canonical
from schemas.records import Verdict
from schemas.sealed import seal, unseal
from stages.contract import Near

FILE = "duplicates.json"  # of a build
LISTED = 10_000  # pairs of images of different targets that are named; all are counted


class _Pool:
    """Images with their names and signatures, in the order in which they came."""

    def __init__(self) -> None:
        self.names: list[Any] = []
        self._hash_N = np.zeros(0, np.int64)
        self._embedding_NE = np.zeros((0, 0), np.float32)

    def add(self, name: Any, own_hash: int, own_E: np.ndarray) -> None:
        count = len(self.names)
        if count == len(self._hash_N):
            more = max(64, count)
            self._hash_N = np.concatenate([self._hash_N, np.zeros(more, np.int64)])
            grown = np.zeros((count + more, len(own_E)), np.float32)
            if count:
                grown[:count] = self._embedding_NE
            self._embedding_NE = grown
        self._hash_N[count], self._embedding_NE[count] = own_hash, own_E
        self.names.append(name)

    def nearest(self, chosen: FilterPlan, own_hash: int, own_E: np.ndarray) -> Near | None:
        count = len(self.names)
        if not count:
            return None
        found: Near | None = chosen.method.nearest(
            own_hash, own_E, self._hash_N[:count], self._embedding_NE[:count]
        )
        return found


class Distinct:
    """The streams of one target whose candidates are compared with each other."""

    def __init__(self, plans: Sequence[StreamPlan], order: Iterable[str]):
        """`order`: the stream of each accepted slot."""
        self.plans = {plan.id: plan for plan in plans}
        self.streams = {p.id: ComparedStream(self, p.id, p.quota, p.max_units, p.unit) for p in plans}
        self.verdicts: dict[tuple[str, int], Verdict] = {}  # of the candidates that were rejected here
        self.ready = all(f.artifact is None for f in self._filters.values())
        self._order = list(order)
        self._references: dict[str, _Pool] = {p.id: _Pool() for p in plans}
        self._signatures: dict[tuple[str, int], Signatures] = {}
        self._restart()

    @property
    def _filters(self) -> dict[str, FilterPlan]:
        found = {name: plan.pairwise for name, plan in self.plans.items()}
        return {name: chosen for name, chosen in found.items() if chosen}

    def load(self, store: Store) -> None:
        """Read the signatures of the references. Raises `FileNotFoundError` when they are not made yet."""
        for name, chosen in self._filters.items():
            pool = self._references[name] = _Pool()
            if chosen.artifact:
                made = read_tensors(store, artifact_name(chosen.artifact))
                hash_N, embedding_NE = made["hash"].numpy(), made["embedding"].numpy()
                for reference, own_hash, own_E in zip(chosen.compared, hash_N, embedding_NE, strict=True):
                    pool.add(reference.origin, int(own_hash), own_E)
        self.ready = True

    def with_references(self, name: str, unit: int, outcomes: Sequence[str], found: Signatures) -> list[str]:
        """The outcomes of a unit, given that some candidates are too near to references."""
        assert self.ready, "the references come first"
        judged, size = list(outcomes), self.plans[name].unit
        chosen = self._filters[name]
        for place, outcome in enumerate(outcomes):
            if outcome != PASSED:
                continue
            own_hash, own_E = int(found.hash_U[place]), found.embedding_UE[place]
            if not np.isfinite(own_E).all():
                text = "its features are not finite"
                verdict = Verdict(False, _rule(chosen, "features"), float("nan"), 0, text)
            elif near := self._references[name].nearest(chosen, own_hash, own_E):
                other = self._references[name].names[near.place]
                verdict = _verdict(chosen, "reference", near, f"the reference {other}")
            else:
                continue
            judged[place] = verdict.rule
            self.verdicts[name, unit * size + place] = verdict
        self._signatures[name, unit] = found
        return judged

    def advance(self) -> None:
        """Fill slots as far as is known."""
        rejected: dict[str, dict[int, str]] = {name: {} for name in self.plans}
        while self._slot < len(self._order):
            name = self._order[self._slot]
            stream, index = self.streams[name], self._next[name]
            unit, place = divmod(index, stream.unit_size)
            if unit >= stream.max_units:
                self._slot += 1  # nothing is left to fill it
                continue
            if not stream.knows(unit):
                break
            self._next[name] += 1
            if not stream.passes(index):
                continue
            found, chosen = self._signatures[name, unit], self._filters[name]
            own_hash, own_E = int(found.hash_U[place]), found.embedding_UE[place]
            if near := self._accepted.nearest(chosen, own_hash, own_E):
                stream_id, other = self._accepted.names[near.place]
                verdict = _verdict(chosen, "candidate", near, self.plans[stream_id].key(other))
                rejected[name][index] = verdict.rule
                self.verdicts[name, index] = self._between[name, index] = verdict
            else:
                self._accepted.add((name, index), own_hash, own_E)
                self._slot += 1
        for name, outcomes in rejected.items():
            if outcomes:
                self.streams[name].revise(outcomes)

    def forget(self, name: str, units: Sequence[int]) -> None:
        """Decide anew, without these units of a stream, which it has forgotten already."""
        for unit in units:
            self._signatures.pop((name, unit), None)
        size, gone = self.plans[name].unit, set(units)
        for key in [key for key in self.verdicts if key[0] == name and key[1] // size in gone]:
            del self.verdicts[key]
        undone: dict[str, dict[int, str]] = {other: {} for other in self.plans}
        for other, index in self._between:
            self.verdicts.pop((other, index), None)
            if self.streams[other].knows(index // self.plans[other].unit):
                undone[other][index] = PASSED
        for other, outcomes in undone.items():
            self.streams[other].revise(outcomes)
        self._restart()
        self.advance()

    def _restart(self) -> None:
        self._slot = 0
        self._next = dict.fromkeys(self.plans, 0)
        self._accepted = _Pool()
        self._between: dict[tuple[str, int], Verdict] = {}  # of the verdicts those by other candidates

    def accepted(self, selections: Mapping[str, Selection]) -> Iterator[tuple[str, int, int, np.ndarray]]:
        """Stream, candidate and signature of every accepted image."""
        for name, plan in self.plans.items():
            for index in selections[name].accepted.tolist():
                unit, place = divmod(index, plan.unit)
                found = self._signatures[name, unit]
                yield name, index, int(found.hash_U[place]), found.embedding_UE[place]


class ComparedStream(Stream):
    """A stream whose candidates are compared with those of its target."""

    def __init__(self, distinct: Distinct, name: str, quota: int, max_units: int, unit_size: int):
        super().__init__(quota, max_units, unit_size)
        self.distinct, self._name = distinct, name

    def learn(
        self, unit: int, outcomes: Sequence[str], environment: str, signatures: Signatures | None = None
    ) -> None:
        if unit >= self.max_units or self.knows(unit):
            return
        assert signatures is not None
        judged = self.distinct.with_references(self._name, unit, outcomes, signatures)
        super().learn(unit, judged, environment)
        self.distinct.advance()

    def forget(self, units: Iterable[int]) -> None:
        lost = list(units)
        super().forget(lost)
        self.distinct.forget(self._name, lost)


def make_streams(plan: Plan) -> dict[str, Stream]:
    """The streams of a plan, of which nothing is known yet."""
    made: dict[str, Stream] = {}
    for _, of_target in itertools.groupby(plan.streams, lambda s: s.target):
        streams = list(of_target)
        shares, quota = {s.recipe: s.share for s in streams}, sum(s.quota for s in streams)
        compared: dict[str, list[StreamPlan]] = {}
        for s in streams:
            made[s.id] = Stream(s.quota, s.max_units, s.unit)
            if s.pairwise:
                compared.setdefault(s.pairwise.id, []).append(s)  # signatures of other models do not compare
        for alike in compared.values():
            ids = {s.recipe: s.id for s in alike}
            made |= Distinct(alike, [ids[recipe] for recipe in slots(shares, quota) if recipe in ids]).streams
    return made


def distincts(streams: Mapping[str, Stream]) -> list[Distinct]:
    """Those that these streams belong to."""
    found = [stream.distinct for stream in streams.values() if isinstance(stream, ComparedStream)]
    return list({id(distinct): distinct for distinct in found}.values())


def _rule(chosen: FilterPlan, what: str) -> str:
    return f"{chosen.method.name}.{what}"


def _verdict(chosen: FilterPlan, what: str, near: Near, other: str) -> Verdict:
    return Verdict(False, _rule(chosen, what), near.score, near.threshold, f"{near.reason}, to {other}")


# --- what a build tells of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a build's file says: why candidates were rejected, and what is alike in different targets."""

    rejected: Mapping[str, Verdict]  # key of the candidate → why
    across: Sequence[tuple[str, str, str]]  # keys of two accepted images, and how near they are
    pairs: int  # of such images; at most LISTED are named


def tell(plan: Plan, streams: Mapping[str, Stream], selections: Mapping[str, Selection]) -> Told | None:
    """What there is to tell of a build whose selection is final; None when nothing was compared."""
    groups = distincts(streams)
    if not groups:
        return None
    rejected = {
        plan.by_id[name].key(index): verdict
        for distinct in groups
        for (name, index), verdict in sorted(distinct.verdicts.items())
        if index < selections[name].units * plan.by_id[name].unit
    }
    across: list[tuple[str, str, str]] = []
    pairs, before = 0, dict[bytes, list[_Pool]]()
    for distinct in groups:
        pools: dict[bytes, _Pool] = {}
        for name, index, own_hash, own_E in distinct.accepted(selections):
            chosen = plan.by_id[name].pairwise
            assert chosen is not None
            model = canonical(dict(chosen.method.scored()))
            key = plan.by_id[name].key(index)
            for pool in before.get(model, []):
                if near := pool.nearest(chosen, own_hash, own_E):
                    pairs += 1
                    if len(across) < LISTED:
                        across.append((key, pool.names[near.place], near.reason))
            pools.setdefault(model, _Pool()).add(key, own_hash, own_E)
        for model, pool in pools.items():
            before.setdefault(model, []).append(pool)
    return Told(rejected, across, pairs)


def to_bytes(told: Told) -> bytes:
    return seal(
        {
            "rejected": {
                key: {**vars(v), "score": v.score if np.isfinite(v.score) else None}
                for key, v in told.rejected.items()
            },
            "across": [list(pair) for pair in told.across],
            "pairs": told.pairs,
        }
    )


def told_of(store: Store, build_id: str) -> Told:
    """What a complete build tells; of one in which nothing was compared, nothing."""
    name = f"builds/{build_id}/{FILE}"
    try:
        content = unseal(store.get(name), f"{store.uri}/{name}")
    except FileNotFoundError:
        return Told({}, (), 0)
    rejected = {
        key: Verdict(**{**v, "score": float("nan") if v["score"] is None else v["score"]})
        for key, v in content["rejected"].items()
    }
    return Told(
        rejected, [(one, other, reason) for one, other, reason in content["across"]], content["pairs"]
    )
