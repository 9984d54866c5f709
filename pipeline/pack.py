"""Packing: accepted candidates into shards of equal size, in an order that the build alone decides.

The parts are put in the order of a hash, which mixes targets; their accepted rows in a row are cut into
windows of a few shards, and each window is shuffled and becomes one task. A part is read by one task, or by
two where it lies across the border of two windows; a task reads each of its parts once. Threads read parts
and write shards: most of that is waiting, and hashing and compressing leave Python free.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.parts import contents, outcome, part_name, read_table, scores_name, to_parquet
from pipeline.plan import Plan
from pipeline.select import PASSED, Selection
from pipeline.store import Store
from pipeline.tasks import Outdated, PackTask, ShardReceipt
from schemas import tables
from schemas.ids import canonical, random_stream, sha256
from stages.shard import sample, tar

THREADS = 4  # of one task


def count_shards(plan: Plan, selections: Mapping[str, Selection]) -> int:
    return math.ceil(sum(len(s.accepted) for s in selections.values()) / plan.config.shard.samples)


def plan_shards(plan: Plan, selections: Mapping[str, Selection]) -> Iterator[PackTask]:
    """Every accepted candidate, once, in shards. Shape letters: P parts, R rows."""
    if not count_shards(plan, selections):
        return
    streams = list(selections)
    places: list[np.ndarray] = []
    units: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for name, selection in selections.items():
        unit_R, place_R = np.divmod(selection.accepted, plan.by_id[name].unit)
        unit_P, count_P = np.unique(unit_R, return_counts=True)
        places.append(place_R.astype(np.int32))
        units.append(unit_P)
        counts.append(count_P)
    stream_P = np.repeat(np.arange(len(streams)), [len(found) for found in units])
    place_R, unit_P, count_P = (np.concatenate(found) for found in (places, units, counts))
    first_P = np.cumsum(count_P) - count_P  # where the rows of a part begin

    hashes = b"".join(_hashes(name, found) for name, found in zip(streams, units, strict=True))
    order_P = np.argsort(np.frombuffer(hashes, "S10"), kind="stable")
    del places, units, counts, hashes
    end_P = np.cumsum(count_P[order_P])  # where they end when the parts lie in the order of their hashes
    size, step = plan.config.shard.samples, plan.config.shard.samples * plan.config.shard.window
    for number, start in enumerate(range(0, len(place_R), step)):
        stop = min(start + step, len(place_R))
        low, high = np.searchsorted(end_P, [start, stop - 1], side="right")
        inside = order_P[low : high + 1]
        count = count_P[inside]
        part_R = np.repeat(np.arange(len(inside)), count)
        row_R = np.arange(len(part_R)) + np.repeat(first_P[inside] - (np.cumsum(count) - count), count)
        before = start - (end_P[low] - count[0])  # rows of the first part that the window before has
        rows_R2 = np.stack([part_R, place_R[row_R]], axis=1).astype(np.int32)[before : before + stop - start]
        shuffled = rows_R2[random_stream(plan.config.rng_seed, "pack", number).permutation(len(rows_R2))]
        yield PackTask(
            number * plan.config.shard.window,
            tuple((streams[stream_P[p]], int(unit_P[p])) for p in inside),
            tuple(shuffled[i : i + size] for i in range(0, len(shuffled), size)),
        )


def _hashes(stream: str, units: np.ndarray) -> bytes:
    """Of each part the bytes of `fingerprint(["pack", stream, unit])`, written out because they are many."""
    prefix = canonical(["pack", stream, 0])[: -len("0]")]
    return b"".join(hashlib.sha256(b"%s%d]" % (prefix, unit)).digest()[:10] for unit in units.tolist())


def shard_name(plan: Plan, name: str, suffix: str) -> str:
    return f"{plan.build_folder}/shards/{name}.{suffix}"


def write_shards(store: Store, plan: Plan, task: PackTask) -> tuple[ShardReceipt, ...] | Outdated:
    """Write the shards of a task that are absent, and give the receipts of all.

    A receipt is of the bytes as they must be, made from the parts, not of what happens to lie there: a shard
    that an earlier run left, and that was damaged since, is found by `verify`. Nor is the index believed:
    when a part or its scores are gone, or a candidate is not accepted by them, nothing is written.
    """

    def read(part: tuple[str, int]) -> list[dict[str, Any]]:
        try:
            return read_unit(store, plan, *part)
        except FileNotFoundError:
            return []

    def write(number: int, rows: Sequence[dict[str, Any]]) -> ShardReceipt:
        name = f"{number:06d}"
        packed, table = _shard(plan, name, rows)
        store.put_new(shard_name(plan, name, "tar"), *packed)
        store.put_new(shard_name(plan, name, "parquet"), table)
        tar_bytes = sum(map(len, packed))
        return ShardReceipt(name, len(rows), tar_bytes, sha256(*packed), len(table), sha256(table))

    with ThreadPoolExecutor(THREADS) as threads:
        known = list(threads.map(read, task.parts))
        numbers = [rows.tolist() for rows in task.shards]
        outdated = {
            part
            for rows in numbers
            for part, place in rows
            if not known[part] or known[part][place]["outcome"] != PASSED
        }
        if outdated:
            return Outdated(tuple(task.parts[part] for part in sorted(outdated)))
        shards = [[known[part][place] for part, place in rows] for rows in numbers]
        return tuple(threads.map(write, range(task.first, task.first + len(shards)), shards))


def read_unit(store: Store, plan: Plan, stream_id: str, unit: int) -> list[dict[str, Any]]:
    """The candidates of a unit as rows of the sample table, with the columns of the part beside them.

    `image` is a view of the encoded bytes, or None; `outcome` is as `pipeline.select` knows it.
    """
    stream = plan.by_id[stream_id]
    table = read_table(store, part_name(stream, unit))
    candidates = table.drop_columns(["image"]).to_pylist()
    blank = dict.fromkeys(plan.score_names)
    for candidate, image in zip(candidates, contents(table), strict=True):
        candidate |= {**blank, "image": image}
        candidate |= {"class": stream.label, "class_index": stream.class_index, "recipe": stream.recipe}
        candidate |= {"stream": stream.id, "unit": unit}
    scored = [
        read_table(store, scores_name(stream, f, unit), ["index", *f.method.columns()]).to_pylist()
        for f in stream.filters
    ]
    for place, candidate in enumerate(candidates):
        scores = [rows[place] for rows in scored]
        candidate["outcome"] = outcome(stream, candidate["status"], scores)
        for f, score in zip(stream.filters, scores, strict=True):
            for column in f.method.columns():
                candidate[tables.score_name(f.method.name, column)] = score[column]
    return candidates


def _shard(plan: Plan, name: str, samples: Sequence[dict[str, Any]]) -> tuple[list[tar.Content], bytes]:
    """The pieces of a tar, and the Parquet beside it."""
    schema = tables.samples(plan.score_names)
    members: dict[str, tar.Content] = {}
    for s in samples:
        described = ("class", "recipe", "stream", "unit", "index", "image_sha256")
        recipe = {column: s[column] for column in described}
        image = plan.config.shard.image
        members |= sample.members(s["key"], s["image"], image, s["class_index"], s["prompt"], recipe)
    packed, spans = tar.pieces(members)
    rows = []
    for s in samples:
        member = f"{s['key']}.{sample.EXTENSIONS[plan.config.shard.image]}"
        span = spans[member]
        place = {"shard": name, "member": member, "offset": span.offset, "length": span.length}
        rows.append({column: (s | place)[column] for column in schema.names})
    rows.sort(key=lambda row: row["offset"])
    metadata = {"version": tables.VERSION, "build": plan.build_id}
    return packed, to_parquet(rows, schema, metadata)
