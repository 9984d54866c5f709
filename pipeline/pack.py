"""Packing: accepted candidates into shards of equal size, in an order that the build alone decides.

The parts are put in the order of a hash, which mixes targets; their accepted rows in a row are cut into
windows of a few shards, and each window is shuffled and becomes one task. A part is read by one task, or by
two where it lies across the border of two windows.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.parts import part_name, read_table, scores_name, to_parquet
from pipeline.plan import Plan
from pipeline.select import Selection
from pipeline.store import Store
from pipeline.tasks import PackTask, Row, ShardReceipt
from schemas import tables
from schemas.ids import fingerprint, random_stream, sha256
from stages.shard import sample, tar


def plan_shards(plan: Plan, selections: Mapping[str, Selection]) -> list[PackTask]:
    """Every accepted candidate, once, in shards."""
    by_part: dict[tuple[str, int], list[Row]] = {}
    for stream, selection in selections.items():
        for unit, place in selection.accepted:
            by_part.setdefault((stream, unit), []).append(Row(stream, unit, place))
    ordered = sorted(by_part, key=lambda part: fingerprint(["pack", *part]))
    rows = [row for part in ordered for row in by_part[part]]

    size, tasks = plan.config.shard.samples, []
    step = size * plan.config.shard.window
    for number, start in enumerate(range(0, len(rows), step)):
        window = rows[start : start + step]
        order = random_stream(plan.config.rng_seed, "pack", number).permutation(len(window))
        shuffled = [window[i] for i in order]
        shards = tuple(tuple(shuffled[i : i + size]) for i in range(0, len(shuffled), size))
        tasks.append(PackTask(number * plan.config.shard.window, shards))
    return tasks


def shard_name(plan: Plan, name: str, suffix: str) -> str:
    return f"{plan.build_folder}/shards/{name}.{suffix}"


def write_shards(store: Store, plan: Plan, task: PackTask) -> tuple[ShardReceipt, ...]:
    """Write the shards of a task that are absent, and give the receipts of all.

    A receipt is of the bytes as they must be, made from the parts, not of what happens to lie there: a shard
    that an earlier run left, and that was damaged since, is found by `verify`.
    """
    cache: dict[tuple[str, int], list[dict[str, Any]]] = {}
    receipts = []
    for number, rows in enumerate(task.shards, start=task.first):
        name = f"{number:06d}"
        packed, table = _shard(plan, name, [_sample(store, plan, cache, row) for row in rows])
        store.put_new(shard_name(plan, name, "tar"), packed)
        store.put_new(shard_name(plan, name, "parquet"), table)
        receipts.append(ShardReceipt(name, len(rows), len(packed), sha256(packed), len(table), sha256(table)))
    return tuple(receipts)


def _sample(
    store: Store, plan: Plan, cache: dict[tuple[str, int], list[dict[str, Any]]], row: Row
) -> dict[str, Any]:
    """One accepted candidate with its recipe and scores; `image` holds its bytes."""
    if (row.stream, row.unit) not in cache:
        cache[row.stream, row.unit] = read_unit(store, plan, row.stream, row.unit)
    return cache[row.stream, row.unit][row.place]


def read_unit(store: Store, plan: Plan, stream_id: str, unit: int) -> list[dict[str, Any]]:
    """The candidates of a unit as rows of the sample table, with the columns of the part beside them."""
    stream = plan.by_id[stream_id]
    candidates = read_table(store, part_name(stream, unit)).to_pylist()
    blank = dict.fromkeys(plan.score_names)
    for candidate in candidates:
        candidate |= blank
        candidate |= {"class": stream.label, "class_index": stream.class_index, "recipe": stream.recipe}
        candidate |= {"stream": stream.id, "unit": unit}
    for f in stream.filters:
        scores = read_table(store, scores_name(stream, f, unit)).to_pylist()
        for candidate, score in zip(candidates, scores, strict=True):
            for column in f.method.columns():
                candidate[tables.score_name(f.method.name, column)] = score[column]
    return candidates


def _shard(plan: Plan, name: str, samples: Sequence[dict[str, Any]]) -> tuple[bytes, bytes]:
    """The bytes of a tar and of the Parquet beside it."""
    schema = tables.samples(plan.score_names)
    members: dict[str, bytes] = {}
    for s in samples:
        described = ("class", "recipe", "stream", "unit", "index", "image_sha256")
        recipe = {column: s[column] for column in described}
        image = plan.config.shard.image
        members |= sample.members(s["key"], s["image"], image, s["class_index"], s["prompt"], recipe)
    buffer = io.BytesIO()
    spans = tar.write(buffer, members)
    rows = []
    for s in samples:
        member = f"{s['key']}.{sample.EXTENSIONS[plan.config.shard.image]}"
        span = spans[member]
        place = {"shard": name, "member": member, "offset": span.offset, "length": span.length}
        rows.append({column: (s | place)[column] for column in schema.names})
    rows.sort(key=lambda row: row["offset"])
    metadata = {"version": tables.VERSION, "build": plan.build_id}
    return buffer.getvalue(), to_parquet(rows, schema, metadata)
