"""The harness of every evaluation: (builds × arms × metrics) → tables.

    arms ─► ordinary builds in one store ─► images read back from their shards ─► features ─► tables

An arm is a name and a build config. Its images are what an ordinary build makes of it, so an arm is resumed,
cached and reproduced like any dataset, and the seconds of building are told apart from those of measuring.
All arms write to one store: seeds are shared by fingerprint, and arms whose recipes bear the same name draw
the same reference seeds in the same places.

A table compares views of arms: whole builds, or some recipes or classes of them.

Shape letters: N images, h w image.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from jobs.build import make_runner
from jobs.evaluate.metrics import (
    Array,
    Difference,
    Features,
    Measure,
    Moments,
    Observers,
    compare,
    diversity,
    estimate,
    frechet_to,
    mean_of,
    resamples,
    share,
)
from jobs.tangram.drawings import CLASSES, draw, generator
from pipeline.build import build
from pipeline.config import method_of, parse
from pipeline.ledger import replan
from pipeline.pack import shard_name
from pipeline.parts import read_table
from pipeline.plan import Plan
from pipeline.seeds import load_seeds
from pipeline.store import Store
from pipeline.telemetry import Tally
from schemas.errors import Damaged, UserError
from schemas.ids import random_stream, sha256
from schemas.manifest import Manifest
from schemas.sealed import unseal
from stages import images
from stages.contract import Chance

QUIET_SECONDS = 30.0
# Whether norms differ is no question: methods set them.
COMPARED = ("accuracy", "frechet_judge", "frechet_clip", "diversity")
SPLIT = "evaluation"  # of the drawings that images are measured against: nothing was ever trained on it

# class, recipe, number of the candidate: equal in all arms whose recipes bear the same names
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Arm:
    """A way of making images: its name, and its build config without `output` and `run`."""

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Built:
    """The complete build of an arm."""

    arm: Arm
    manifest: Manifest
    plan: Plan
    made: bool  # false: it was there
    seconds: float  # of the run that completed it, without the start of its workers
    phases: Mapping[str, float] = field(default_factory=dict)  # the same by phase: invert, generate, …


@dataclass(frozen=True)
class Seen:
    """Images of an arm as the observers see them, in the order of their keys."""

    keys: tuple[Key, ...]
    groups: tuple[Any, ...]  # what was made from the same reference seeds is one group
    distinct_N: Array  # 0 for an image that the arm made before
    norm_N: Array | None  # |z|/√d of the seeds; real images have none
    features: Features
    failed: tuple[Key, ...] = ()  # asked for, and nothing came of them
    rows: tuple[Mapping[str, Any], ...] = ()  # how each came to be, and what was measured of it

    def only(self, keep: Callable[[Key], bool]) -> Seen:
        rows = [row for row, key in enumerate(self.keys) if keep(key)]
        return Seen(
            tuple(self.keys[row] for row in rows),
            tuple(self.groups[row] for row in rows),
            self.distinct_N[rows],
            None if self.norm_N is None else self.norm_N[rows],
            self.features.of(rows),
            tuple(key for key in self.failed if keep(key)),
            tuple(self.rows[row] for row in rows) if self.rows else (),
        )


@dataclass(frozen=True)
class View:
    """What a row of a table shows: an arm, or some recipes or classes of it."""

    arm: str
    recipes: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def holds(self, key: Key) -> bool:
        label, recipe, _ = key
        wanted = self.recipes is None or recipe in self.recipes
        return wanted and (self.classes is None or label in self.classes)


@dataclass(frozen=True)
class Table:
    """Rows, and the pairs of rows of which it is asked whether they differ."""

    name: str
    title: str  # with what holds of every row: steps, guidance
    rows: Mapping[str, View]
    asked: tuple[tuple[str, str], ...] = ()
    compared: tuple[str, ...] = COMPARED  # the metrics of which it is asked


@dataclass(frozen=True)
class Result:
    """A table with its figures."""

    name: str
    title: str
    rows: Mapping[str, Mapping[str, Measure]]  # row → metric → figure
    differences: Mapping[tuple[str, str, str], Difference] = field(default_factory=dict)  # row, other, metric
    builds: Mapping[str, str] = field(default_factory=dict)  # row → id of its build


# --- builds -------------------------------------------------------------------------------------------------


class Progress:
    """The telemetry of many builds: a line every half minute, and none for what their manifests say."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def say(self, text: str, **facts: Any) -> None:
        pass

    def phase(self, name: str, total: int) -> None:
        self._name, self._done, self._total = name, 0, total

    def advance(self, items: int, total: int | None = None) -> None:
        self._done += items
        self._total = total or self._total
        if time.monotonic() - self._printed > QUIET_SECONDS:
            self._printed = time.monotonic()
            print(f"  {self._name}: {self._done}/{self._total}", file=sys.stderr, flush=True)

    def tallies(self, tallies: dict[str, Tally]) -> None:
        pass

    def close(self) -> None:
        pass


def make(arms: Sequence[Arm], output: str, run: Mapping[str, Any]) -> dict[str, Built]:
    """Build every arm, or find it built. Arms are built in their order; each is told in a line."""
    configs = {
        arm.name: parse({**arm.config, "output": output, "run": run}, f"arm {arm.name!r}") for arm in arms
    }
    done: dict[str, Built] = {}
    for number, arm in enumerate(arms, start=1):
        result = build(configs[arm.name], Progress(), make_runner)
        store = Store(output)
        record = f"{result.folder}/run.json"
        seconds = unseal(store.get(record), f"{output}/{record}")["seconds"]
        built = Built(
            arm, result.manifest, replan(store, result.manifest.build_id), result.made,
            sum(value for name, value in seconds.items() if name != "start"), seconds,
        )  # fmt: skip
        done[arm.name] = built
        told = (
            f"built in {built.seconds:.0f} s"
            if built.made
            else f"nothing to do ({built.seconds:.0f} s when built)"
        )
        short = f"; {built.manifest.shortfall} images failed" if built.manifest.shortfall else ""
        print(f"[{number}/{len(arms)}] {arm.name}: {told}{short}", file=sys.stderr, flush=True)
    return done


def read(store: Store, built: Built) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every accepted image of a build with its row: what the manifest names, and nothing else."""
    for shard in built.manifest.shards:
        packed = store.get(shard_name(built.plan, shard.name, "tar"))
        if sha256(packed) != shard.tar_sha256:
            name = shard_name(built.plan, shard.name, "tar")
            raise Damaged(f"{store.uri}/{name}: damaged; remove {built.plan.build_folder} and run again")
        for row in read_table(store, shard_name(built.plan, shard.name, "parquet")).to_pylist():
            yield row, packed[row["offset"] : row["offset"] + row["length"]]


def look(store: Store, built: Built, observers: Observers) -> Seen:
    """The images of a build before the observers."""
    found: dict[Key, tuple[Any, dict[str, Any], Tensor]] = {}
    for row, data in read(store, built):
        key = (row["class"], row["recipe"], row["index"])
        # a weight of 0 took nothing from its seed
        parents = tuple(p for p, w in zip(row["parents"], row["weights"], strict=True) if w)
        pixels_hw3 = np.array(images.decode(data))
        made_of = parents or row["source"]
        group = (row["class"], row["recipe"], made_of) if made_of else key
        found[key] = (group, row, torch.from_numpy(pixels_hw3).permute(2, 0, 1))
    if not found:
        raise UserError(f"arm {built.arm.name!r}: none of its images could be drawn")
    keys = sorted(found)
    groups, rows, pixels = zip(*(found[key] for key in keys), strict=True)
    hashes = [row["image_sha256"] for row in rows]
    first = {(key[0], digest): key for key, digest in reversed(list(zip(keys, hashes, strict=True)))}
    return Seen(
        tuple(keys),
        groups,
        np.array([float(first[key[0], digest] == key) for key, digest in zip(keys, hashes, strict=True)]),
        np.array([row["seed_norm"] for row in rows]),
        observers.look(torch.stack(pixels)),
        _missing(built.plan, keys),
        rows,
    )


def _missing(plan: Plan, keys: Sequence[Key]) -> tuple[Key, ...]:
    """Candidates in the place of the images that a quota lacks."""
    there, missing = set(keys), []
    for stream in plan.streams:
        absent = [key for i in range(stream.quota) if (key := (stream.label, stream.recipe, i)) not in there]
        accepted = sum(key[:2] == (stream.label, stream.recipe) for key in keys)
        missing += absent[: stream.quota - accepted]
    return tuple(missing)


# --- real drawings ------------------------------------------------------------------------------------------


def drawings(
    classes: Sequence[str], per_class: int, rng_seed: int
) -> tuple[list[str], UInt8[Tensor, "N 3 h w"]]:
    """Fresh drawings of classes in equal numbers: labels and pixels."""
    labels, pictures = [], []
    for label in classes:
        for index in range(per_class):
            labels.append(label)
            pictures.append(np.asarray(draw(label, generator(SPLIT, label, index, rng_seed))[0]))
    return labels, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Real:
    """Fresh drawings that distances refer to, by class."""

    features: Mapping[str, Features]

    @classmethod
    def seen_by(cls, observers: Observers, classes: Sequence[str], per_class: int) -> Real:
        labels, pixels = drawings(classes, per_class, rng_seed=0)
        seen = observers.look(pixels)
        rows = {label: [i for i, other in enumerate(labels) if other == label] for label in classes}
        return cls({label: seen.of(rows[label]) for label in classes})

    def moments(self, classes: Sequence[str]) -> tuple[Moments, Moments]:
        """Of the judge's features and of the CLIP's, over balanced drawings of these classes."""
        chosen = [self.features[label] for label in classes]
        judge_ND = np.concatenate([f.judge_ND for f in chosen])
        return Moments.of(judge_ND), Moments.of(np.concatenate([f.clip_ND for f in chosen]))


def drawn_like(seen: Seen, observers: Observers) -> Seen:
    """Other fresh drawings in the numbers of an arm: what its figures would be if its images were perfect."""
    labels = [label for label, _, _ in seen.keys]
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    pixels = torch.cat([drawings([label], count, rng_seed=1)[1] for label, count in counts.items()])
    return Seen(seen.keys, seen.keys, np.ones(len(seen.keys)), None, observers.look(pixels))


# --- tables -------------------------------------------------------------------------------------------------


def tabulate(
    table: Table,
    seen: Mapping[str, Seen],
    real: Real,
    builds: Mapping[str, Built],
    further: Callable[[View, Seen], Mapping[str, Measure]] = lambda view, seen: {},
) -> Result:
    """The figures of a table with `further` ones of its rows, and the differences that it asks for."""
    views = {row: seen[view.arm].only(view.holds) for row, view in table.rows.items()}
    # distances depend on n, so they are taken over the images that every row has
    common = set.intersection(*(set(view.keys) for view in views.values()))
    if not common:
        raise UserError(f"table {table.name!r}: no image was drawn in all of its rows; leave out what failed")
    found = {row: figures(view, view.only(common.__contains__), real) for row, view in views.items()}
    rows = {row: {**found[row], **further(view, views[row])} for row, view in table.rows.items()}
    differences = {
        (one, other, metric): compare(figure, rows[other][metric])
        for one, other in table.asked
        for metric, figure in rows[one].items()
        if metric in rows[other] and metric in table.compared
    }
    ids = {row: builds[v.arm].manifest.build_id for row, v in table.rows.items() if v.arm in builds}
    return Result(table.name, table.title, rows, differences, ids)


def figures(whole: Seen, common: Seen, real: Real) -> dict[str, Measure]:
    """Every metric of one row. What failed to be drawn was not recognised either."""
    hit_N = np.array(
        [
            CLASSES[verdict] == key[0]
            for verdict, key in zip(whole.features.verdict_N, whole.keys, strict=True)
        ]
        + [False] * len(whole.failed),
        dtype=np.float64,
    )
    distinct_N = np.concatenate([whole.distinct_N, np.ones(len(whole.failed))])
    found = {"accuracy": share(hit_N, distinct_N, [*whole.groups, *whole.failed])}

    times_RN = resamples(common.groups)
    groups = len(set(common.groups))
    labels = [label for label, _, _ in common.keys]
    for metric, moments, x_ND in zip(
        ("frechet_judge", "frechet_clip"),
        real.moments(list(dict.fromkeys(labels))),
        (common.features.judge_ND, common.features.clip_ND),
        strict=True,
    ):
        if len(x_ND) > 1:
            found[metric] = estimate(frechet_to(moments, x_ND), times_RN, groups, x_ND.shape[1])
    if len(set(labels)) < len(labels):
        clip_ND = common.features.clip_ND
        found["diversity"] = estimate(diversity(clip_ND, labels), times_RN, groups, clip_ND.shape[1])
    if common.norm_N is not None:
        found["norm"] = estimate(mean_of(common.norm_N), times_RN, groups)
    return found


# --- time of combining --------------------------------------------------------------------------------------


def milliseconds(
    built: Built, recipe: str, shape: tuple[int, int, int] | None, paths: int, limit: float
) -> Measure:
    """Median milliseconds of the combine calls of one path or one group, over the first draws of an arm.

    The seeds are those of the build, or random noise of another shape. One call warms up; it stops after
    `paths`, or after `limit` seconds and at least three.
    """
    stream = next(s for s in built.plan.streams if s.recipe == recipe)
    settings = built.plan.config.recipes[recipe].combine
    assert settings is not None
    method = method_of("combine", settings)
    z_KCHW = load_seeds(Store(built.plan.config.output), stream).z_KCHW
    if shape is not None:
        noise = random_stream("milliseconds", *shape).standard_normal((len(z_KCHW), *shape), dtype=np.float32)
        z_KCHW = torch.from_numpy(noise)
    # as the arm says it: a method may have `points` that mean nothing in its mode
    points = built.arm.config["recipes"][recipe]["combine"].get("points", 1)
    identity = (built.plan.config.rng_seed, "combine", stream.label, recipe)

    def path(number: int) -> float:
        indices = range(number * points, (number + 1) * points)
        chosen = [method.draw(Chance(i, identity), len(z_KCHW)) for i in indices]
        groups = [z_KCHW[list(c.parents)] for c in chosen]
        begin = time.perf_counter()
        for z, c in zip(groups, chosen, strict=True):
            method(z, c.weights, {})
        return (time.perf_counter() - begin) * 1e3

    path(0)
    begin, took = time.perf_counter(), list[float]()
    while len(took) < paths and (len(took) < 3 or time.perf_counter() - begin < limit):
        took.append(path(len(took) + 1))
    return Measure(float(np.median(took)), None, None, len(took))
