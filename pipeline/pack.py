"""Packing: accepted candidates into shards of equal size, in an order that the build alone decides.

The parts are put in the order of a hash, which mixes targets; their accepted rows in a row are cut into
windows of a few shards, and each window is shuffled and becomes one task. A part is read by one task, or by
two where it lies across the border of two windows; a task reads each of its parts once. Threads read parts
and write shards: most of that is waiting, and hashing and compressing leave Python free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.parts import contents, part_name, read_table, scores_name, to_parquet
from pipeline.plan import Plan
from pipeline.select import Selection
from pipeline.store import Store
from pipeline.tasks import PackTask, Row, ShardReceipt
from schemas import tables
from schemas.ids import fingerprint, random_stream, sha256
from stages.shard import sample, tar

THREADS = 4  # of one task


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
    parts = list(dict.fromkeys((row.stream, row.unit) for rows in task.shards for row in rows))

    def read(part: tuple[str, int]) -> list[dict[str, Any]]:
        return read_unit(store, plan, *part)

    def write(number: int, rows: Sequence[Row]) -> ShardReceipt:
        name = f"{number:06d}"
        packed, table = _shard(plan, name, [known[row.stream, row.unit][row.place] for row in rows])
        store.put_new(shard_name(plan, name, "tar"), *packed)
        store.put_new(shard_name(plan, name, "parquet"), table)
        tar_bytes = sum(map(len, packed))
        return ShardReceipt(name, len(rows), tar_bytes, sha256(*packed), len(table), sha256(table))

    with ThreadPoolExecutor(THREADS) as threads:
        known = dict(zip(parts, threads.map(read, parts), strict=True))
        return tuple(threads.map(write, range(task.first, task.first + len(task.shards)), task.shards))


def read_unit(store: Store, plan: Plan, stream_id: str, unit: int) -> list[dict[str, Any]]:
    """The candidates of a unit as rows of the sample table, with the columns of the part beside them.

    `image` is a view of the encoded bytes, or None.
    """
    stream = plan.by_id[stream_id]
    table = read_table(store, part_name(stream, unit))
    candidates = table.drop_columns(["image"]).to_pylist()
    blank = dict.fromkeys(plan.score_names)
    for candidate, image in zip(candidates, contents(table), strict=True):
        candidate |= {**blank, "image": image}
        candidate |= {"class": stream.label, "class_index": stream.class_index, "recipe": stream.recipe}
        candidate |= {"stream": stream.id, "unit": unit}
    for f in stream.filters:
        scores = read_table(store, scores_name(stream, f, unit)).to_pylist()
        for candidate, score in zip(candidates, scores, strict=True):
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
