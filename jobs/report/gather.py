"""What a report tells of a build, read from the store: counts, scores, seeds, pictures, times.

Candidates are put on pages by turns: the first of every (stream, verdict), then the second of every, and so
on. So any page is a fair sample, and the first shows every target and every reason for rejecting.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from schemas.errors import Damaged
from schemas.sealed import unseal

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.plan import Plan, StreamPlan
    from pipeline.store import Store
    from schemas.manifest import Manifest
    from schemas.records import Verdict

CARDS = 1000  # candidates on a page
REFERENCES = 600  # reference pictures on a page; with both a page stays below 10 MB
SIDE = 96  # pixels, of a thumbnail
THUMBNAIL_BYTES = 4096
BINS = 40
CLOSE = 6  # of the 64 bits of two perceptual hashes: two pictures that differ in fewer look the same
SHOWN = ("source_class", "noise_ratio", "seed_norm", "combined_norm", "parents_cosine")


@dataclass
class Place:
    """A candidate: where it lies, and what was decided."""

    stream: StreamPlan
    unit: int
    row: dict[str, Any]  # the columns of its part, without the image
    scores: dict[str, float]
    verdict: str  # accepted, rejected, surplus or failed
    rule: str = ""
    reason: str = ""


@dataclass
class Histogram:
    """Values of one score, of accepted candidates and of the others, and the thresholds of filters."""

    accepted: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    thresholds: set[float] = field(default_factory=set)

    def binned(self) -> dict[str, Any]:
        values = np.array([*self.accepted, *self.others])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        counts = {
            name: np.histogram([v for v in given if np.isfinite(v)], edges)[0].tolist()
            for name, given in (("accepted", self.accepted), ("others", self.others))
        }
        return {
            "centres": [_short(c) for c in (edges[:-1] + edges[1:]) / 2],
            "thresholds": sorted(self.thresholds),
            **counts,
        }


@dataclass
class Gathered:
    """All that is read of the candidates: where those lie that pages show, and the values of the scores."""

    places: list[Place]
    scores: dict[str, Histogram]
    total: int


def gather(store: Store, plan: Plan, pages: int | None) -> Gathered:
    """Look at every candidate of the build; keep those that the first `pages` pages may show."""
    from pipeline.distinct import told_of

    # a candidate that many of its own stratum precede is not on these pages, whatever the others are
    limit = None if pages is None else pages * CARDS
    found: list[tuple[int, int, Place]] = []
    scores: dict[str, Histogram] = {}
    told = told_of(store, plan.build_id).rejected
    total = 0
    for number, stream in enumerate(plan.streams):
        ranks: Counter[str] = Counter()
        for place in _candidates(store, stream, told):
            total += 1
            for name, value in place.scores.items():
                if value is not None:
                    known = scores.setdefault(name, Histogram())
                    (known.accepted if place.verdict == "accepted" else known.others).append(value)
            for name, threshold in _thresholds(stream).items():
                if name in scores:
                    scores[name].thresholds.add(threshold)
            stratum = f"{place.verdict} {place.rule}"
            if limit is None or ranks[stratum] < limit:
                found.append((ranks[stratum], number, place))
            ranks[stratum] += 1
    found.sort(key=lambda item: item[:2])
    return Gathered([place for _, _, place in found], dict(sorted(scores.items())), total)


def _candidates(store: Store, stream: StreamPlan, told: Mapping[str, Verdict]) -> Iterator[Place]:
    """The candidates that selection looked at, in their order, with its verdicts.

    `told`: key → why a candidate was rejected because of others.
    """
    from pipeline.parts import judge, part_name, read_table, scores_name
    from schemas.tables import PART, score_name

    columns = [name for name in PART.names if name != "image"]
    owed = stream.quota
    for unit in range(stream.max_units):
        if owed <= 0:
            return
        rows = read_table(store, part_name(stream, unit), columns).to_pylist()
        scored = [
            read_table(store, scores_name(stream, f, unit), ["index", *f.method.columns()]).to_pylist()
            for f in stream.filters
        ]
        for number, row in enumerate(rows):
            own = [table[number] for table in scored]
            scores = {
                score_name(f.method.name, column): given[column]
                for f, given in zip(stream.filters, own, strict=True)
                for column in f.method.columns()
            }
            place = Place(stream, unit, row, scores, "failed", reason=row["error"] or "")
            if row["status"] == "ok":
                verdicts = judge(stream, own)
                refused = next((v for v in verdicts if not v.passed), told.get(row["key"]))
                if refused is not None:
                    place.verdict, place.rule, place.reason = "rejected", refused.rule, refused.reason
                else:
                    place.verdict = "accepted" if owed > 0 else "surplus"
                    place.reason = "; ".join(v.reason for v in verdicts)
                    owed -= 1
            yield place


def _thresholds(stream: StreamPlan) -> dict[str, float]:
    """Score column → the threshold of the filter that decides by it."""
    from schemas.tables import score_name

    found = {}
    for f in stream.filters:
        for column in f.method.columns():
            threshold = getattr(f.settings, column, None)
            if f.kind == "filter" and isinstance(threshold, int | float):
                found[score_name(f.method.name, column)] = float(threshold)
    return found


def cards(store: Store, uri: str, manifest: Manifest, plan: Plan, places: Sequence[Place]) -> dict[str, Any]:
    """The candidates of one page with their pictures, and those of the references that they come from."""
    from pipeline.distinct import told_of
    from pipeline.parts import part_name, read_table
    from pipeline.references import fetch, reference_name
    from stages.images import decode

    by_part: dict[tuple[str, int], list[int]] = {}
    for number, place in enumerate(places):
        by_part.setdefault((place.stream.id, place.unit), []).append(number)
    pictures: list[str | None] = [None] * len(places)
    hashes: list[Any] = [None] * len(places)
    for numbers in by_part.values():
        first = places[numbers[0]]
        images = read_table(store, part_name(first.stream, first.unit), ["image"]).column("image")
        for number in numbers:
            place = places[number]
            data = images[place.row["index"] - place.unit * place.stream.unit].as_py()
            if data is not None:
                picture = decode(data)
                pictures[number], hashes[number] = _thumbnail(picture), _hash(picture)

    shown = _references(plan, places)
    kept: dict[str, str] = {}
    known: dict[str, Any] = {}
    for digest in shown:
        if store.exists(reference_name(digest)):  # only those that a recipe used are kept in the store
            picture = decode(fetch(store, digest))
            kept[digest], known[digest] = _thumbnail(picture), _hash(picture)
    by_class = {
        label: [r.sha256 for r in references if r.sha256 in known]
        for label, references in plan.lock.classes.items()
    }
    twins = _twins(places, hashes)
    alike: dict[str, list[str]] = {}  # in other targets, where a filter looked for that
    for one, other, _ in told_of(store, plan.build_id).across:
        alike.setdefault(one, []).append(other)
        alike.setdefault(other, []).append(one)
    made = []
    for number, place in enumerate(places):
        row, label = place.row, place.stream.label
        made.append(
            {
                "key": row["key"],
                "target": place.stream.target,
                "recipe": place.stream.recipe,
                "verdict": place.verdict,
                "rule": place.rule,
                "reason": place.reason,
                "prompt": row["prompt"],
                "scores": {name: _short(v) for name, v in place.scores.items() if v is not None},
                "facts": {n: _short(row[n]) for n in SHOWN if row[n] is not None},
                "parents": [
                    [digest, _short(weight)]
                    for digest, weight in zip(row["parents"], row["weights"], strict=True)
                ],
                "source": row["source"],
                "losses": [_short(v) for v in row["refine_losses"]],
                "trace": [_short(v) for v in row["generate_trace"]],
                "picture": pictures[number],
                "nearest": _nearest(hashes[number], {d: known[d] for d in by_class.get(label, ())}),
                "twins": [*twins[number], *alike.get(row["key"], [])],
                "reproduce": f"seedloom reproduce {_quoted(uri)} {row['key']} --build {manifest.build_id}",
            }
        )
    return {"cards": made, "references": kept, "classes": by_class}


def _references(plan: Plan, places: Sequence[Place]) -> list[str]:
    """References to be shown: what these candidates come from, then others of their classes by turns."""
    used = [d for p in places for d in (*p.row["parents"], *([p.row["source"]] if p.row["source"] else []))]
    classes = sorted({p.stream.label for p in places})
    own = [plan.lock.classes.get(label, ()) for label in classes]
    longest = max(map(len, own), default=0)
    others = [references[n].sha256 for n in range(longest) for references in own if n < len(references)]
    return list(dict.fromkeys([*used, *others]))[:REFERENCES]


def _twins(places: Sequence[Place], hashes: Sequence[Any]) -> list[list[str]]:
    """For each accepted candidate the other accepted ones of its target that look the same."""
    found: list[list[str]] = [[] for _ in places]
    by_target: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        if place.verdict == "accepted" and hashes[number] is not None:
            by_target.setdefault(place.stream.target, []).append(number)
    for numbers in by_target.values():
        for i, one in enumerate(numbers):
            for other in numbers[i + 1 :]:
                if hashes[one] - hashes[other] < CLOSE:
                    found[one].append(places[other].row["key"])
                    found[other].append(places[one].row["key"])
    return found


def _nearest(own: Any, references: dict[str, Any]) -> list[Any] | None:
    """The reference whose perceptual hash is the nearest, and in how many of 64 bits it differs."""
    if own is None or not references:
        return None
    digest = min(references, key=lambda d: (own - references[d], d))
    return [digest, int(own - references[digest])]


def seeds(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """What was measured of the reference seeds: norm, autocorrelation, and why some were refused."""
    from pipeline.seeds import seed_name
    from pipeline.tensors import read_measured

    found: dict[str, dict[str, Any]] = {}
    for stream in plan.streams:
        for reference in stream.references if stream.seeds else ():
            assert stream.seeds is not None
            name = seed_name(stream.seeds, reference)
            if name not in found and len(found) < 4 * REFERENCES and store.exists(name):
                measures = read_measured(store, name)[1]
                found[name] = {
                    "class": stream.label,
                    "origin": reference.origin,
                    "sha256": reference.sha256,
                    "norm": _short(measures.get("norm_ratio")),  # None: it has no seed
                    "autocorrelation": _short(measures.get("autocorrelation")),
                    "refused": measures["refused"],
                }
    return list(found.values())


def run_facts(store: Store, build_id: str) -> dict[str, Any]:
    """Times of the run that completed the build; empty when it is not on record."""
    name = f"builds/{build_id}/run.json"
    try:
        return unseal(store.get(name), f"{store.uri}/{name}")
    except (FileNotFoundError, Damaged):  # nothing depends on it
        return {}


def trace_axis(plan: Plan) -> dict[str, list[float]]:
    """Recipe → the noise ratios that its traces are over, where it chooses among several."""
    from pipeline.config import method_of
    from stages.generate.genie_ada import GenieAda

    methods = {name: method_of("generate", recipe.generate) for name, recipe in plan.config.recipes.items()}
    return {name: list(m.ratios()) for name, m in methods.items() if isinstance(m, GenieAda)}


def _thumbnail(picture: Image) -> str:
    """A data URI of at most THUMBNAIL_BYTES, or of what the lowest quality gives."""
    from PIL import Image

    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    for quality in (75, 50, 25):
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality)
        if file.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _hash(picture: Image) -> Any:
    import imagehash

    return imagehash.phash(picture)


def _short(value: Any) -> Any:
    """Five digits are enough for a reader; what is no number as JSON knows it becomes text."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else str(value)
    return value


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
