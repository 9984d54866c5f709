"""The index: what receipts told, in few objects, so that resuming reads neither parts nor scores.

    index/<rules>/<level>-<hash of its bytes>.parquet

A segment is immutable and holds units of many streams. `<rules>` is a fingerprint of filters with their
thresholds, because these decide what a candidate turned out to be; quotas, targets and streams may change.
The newest receipts are written as a segment of level 0 after so many of them, or so many seconds; `FAN`
segments of one level become one of the next. So n receipts lie in about FAN · log(n) objects.

It is a cache. What is lost of it, or damaged, or was never written, workers learn again from parts and scores
when they are asked for those units; so it is with streams whose candidates are compared with each other, of
which the index holds nothing. What packing finds to be otherwise is forgotten. So its objects may
be removed at any time, by hand as well.
"""

from __future__ import annotations

import io
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.plan import Plan, StreamPlan
from pipeline.select import Stream
from pipeline.store import Store, side_by_side
from schemas import tables
from schemas.ids import fingerprint, sha256

RECEIPTS = 256  # in a segment of level 0
SECONDS = 10.0  # after which it is written with fewer
FAN = 16
BACKLOG = 8  # segments that wait to be written; with more, receipts wait as well
AT_ONCE = 2**16  # rows that streams are told of together, at least
LOOKS = 3  # at a folder, while another build merges there
_MOST_UNITS = 2**40  # of a stream
_NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.parquet")


def _rules(stream: StreamPlan) -> str:
    """What outcomes depend on besides the scores."""
    filters = [[f.kind, f.settings.model_dump(mode="json")] for f in stream.filters]
    return fingerprint({"format": tables.VERSION, "filters": filters})


def _scope(stream: StreamPlan) -> str:
    """What a row of a segment is about: the candidates, and all that decides on them."""
    return fingerprint([stream.id, _rules(stream), [f.id for f in stream.filters]])


class Index:
    """The index as one build sees it. As a context manager it can be written; leaving it writes the rest."""

    def __init__(self, store: Store, plan: Plan, say: Callable[[str], None]):
        self.store, self._say = store, say
        # what is compared with each other must be read again anyway, and is decided for a whole target
        kept = [stream for stream in plan.streams if not stream.pairwise]
        self._scopes = {stream.id: _scope(stream) for stream in kept}
        self._folders = {stream.id: f"index/{_rules(stream)}" for stream in kept}
        self._sizes = {self._scopes[stream.id]: stream.unit for stream in kept}
        self._there: dict[str, set[str]] = defaultdict(set)  # folder → segments
        self._damaged: set[str] = set()
        self._new: dict[str, list[tuple[str, int, str, Sequence[str]]]] = defaultdict(list)  # not written yet
        self._since = time.monotonic()  # the oldest of them
        self._writing: deque[Future[None]] = deque()

    def teach(self, streams: Mapping[str, Stream]) -> None:
        """Tell the streams all that the index has about them."""
        streams = {name: stream for name, stream in streams.items() if name in self._scopes}
        wanted = pa.array([self._scopes[name] for name in streams], pa.string())
        for folder in sorted(set(self._folders.values())):
            some: list[pa.Table] = []
            for _, table in self._segments(folder):
                some.append(table.filter(pc.is_in(table["scope"], wanted)))
                # few together, for joining takes memory; and not one by one, for telling takes time a stream
                if sum(table.num_rows for table in some) > AT_ONCE:
                    self._tell(streams, some)
                    some = []
            self._tell(streams, some)
        pa.default_memory_pool().release_unused()  # or it keeps the most that it ever needed

    def _tell(self, streams: Mapping[str, Stream], segments: Sequence[pa.Table]) -> None:
        if not sum(table.num_rows for table in segments):
            return
        rows = _joined(segments)
        scope, environment, outcomes = (rows[name].chunk(0) for name in ("scope", "environment", "outcomes"))
        rule = outcomes.flatten()
        rules, environments = rule.dictionary.to_pylist(), environment.dictionary.to_pylist()
        unit_N, environment_N = rows["unit"].to_numpy(), environment.indices.to_numpy()
        first_N, rule_M = outcomes.offsets.to_numpy() - outcomes.offsets[0].as_py(), rule.indices.to_numpy()
        scope_N = scope.indices.to_numpy()  # ascending
        borders = np.searchsorted(scope_N, np.arange(len(scope.dictionary) + 1))
        lying = {about: slice(*borders[n : n + 2]) for n, about in enumerate(scope.dictionary.to_pylist())}
        for name, stream in streams.items():
            if here := lying.get(self._scopes[name]):
                places = first_N[:-1][here, None] + np.arange(stream.unit_size)
                stream.learn_all(unit_N[here], rule_M[places], rules, environment_N[here], environments)

    # --- writing -----------------------------------------------------------------------------------------

    def __enter__(self) -> Index:
        self._thread = ThreadPoolExecutor(1, "index")
        self._since = time.monotonic()
        for name in self._damaged:
            self._discard(name)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._write_all()
        with self._thread:
            for written in self._writing:
                raised = written.exception()
                if raised and error is None:  # or else what ended the build is what a person must hear of
                    raise raised

    def add(self, stream: str, unit: int, outcomes: Sequence[str], environment: str) -> None:
        """Keep what a receipt told. Raises what an earlier write in the background raised."""
        if stream not in self._scopes:
            return
        new = self._new[self._folders[stream]]
        new.append((self._scopes[stream], unit, environment, outcomes))
        if len(new) >= RECEIPTS or time.monotonic() - self._since > SECONDS:
            self._write_all()
        while self._writing and (self._writing[0].done() or len(self._writing) > BACKLOG):
            self._writing.popleft().result()

    def forget(self, units: Iterable[tuple[str, int]]) -> None:
        """Remove what segments say of these units. Returns when that is done."""
        self._write_all()
        lost: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for stream, unit in units:
            if stream not in self._scopes:
                continue
            lost[self._folders[stream]][self._scopes[stream]].append(unit)
        for folder, gone in lost.items():
            self._thread.submit(self._remove, folder, gone).result()

    def _write_all(self) -> None:
        for folder, new in self._new.items():
            self._writing.append(self._thread.submit(self._write, folder, new))
        self._new.clear()
        self._since = time.monotonic()

    # in the thread

    def _write(self, folder: str, new: Sequence[tuple[str, int, str, Sequence[str]]]) -> None:
        columns = {
            name: pa.array(column, tables.INDEX.field(name).type)
            for name, column in zip(tables.INDEX.names, zip(*new, strict=True), strict=True)
        }
        self._put(folder, 0, pa.table(columns, tables.INDEX))
        level = 0
        while len(names := [n for n in sorted(self._there[folder]) if _level(n) == level]) >= FAN:
            merged = _joined([t for t in side_by_side(self._segment, names) if t is not None])
            level += 1
            self._replace(folder, names, level, merged)
            del merged
            pa.default_memory_pool().release_unused()

    def _remove(self, folder: str, gone: Mapping[str, Sequence[int]]) -> None:
        for name, table in self._segments(folder):
            stay = np.ones(table.num_rows, bool)
            for about, units in gone.items():
                of_scope = pc.equal(table["scope"], about).to_numpy()
                stay &= ~(of_scope & np.isin(table["unit"].to_numpy(), units))
            if not stay.all():
                self._replace(folder, [name], _level(name), table.filter(pa.array(stay)))

    def _replace(self, folder: str, names: Sequence[str], level: int, table: pa.Table) -> None:
        """Data first: while both are there, they say the same."""
        if table.num_rows:
            self._put(folder, level, table)
        for _ in side_by_side(self._discard, names):
            pass
        self._there[folder] -= set(names)

    def _discard(self, name: str) -> None:
        with suppress(FileNotFoundError):  # another build may have done so
            self.store.remove(name)

    def _put(self, folder: str, level: int, table: pa.Table) -> None:
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd")
        name = f"{folder}/{level}-{sha256(file.getbuffer())}.parquet"
        self.store.put_new(name, file.getvalue())
        self._there[folder].add(name)

    # --- reading -----------------------------------------------------------------------------------------

    def _segments(self, folder: str) -> Iterator[tuple[str, pa.Table]]:
        """All whole segments of a folder, a few of them in memory."""
        found: set[str] = set()
        self._there[folder] = set()
        for _ in range(LOOKS):
            names = [f"{folder}/{n}" for n in self.store.list(folder) if _NAME.fullmatch(n)]
            new = [name for name in names if name not in found and name not in self._damaged]
            tables = side_by_side(self._segment, new, at_once=4)
            for name, table in zip(new, tables, strict=True):
                if table is not None:
                    found.add(name)
                    self._there[folder].add(name)
                    yield name, table
            if found | self._damaged >= set(new):
                break  # or else one was merged into another since it was listed

    def _segment(self, name: str) -> pa.Table | None:
        """The rows of a segment; None when it is gone, or damaged, which is said."""
        try:
            data = self.store.get(name)
        except FileNotFoundError:
            return None
        try:
            return self._checked(data, name.rpartition("-")[2].removesuffix(".parquet"))
        except (pa.ArrowException, OSError, ValueError) as error:
            self._damaged.add(name)
            reason = str(error).splitlines()[0]
            self._say(f"{self.store.uri}/{name}: damaged ({reason}); ignored, its units are looked at again")
            return None

    def _checked(self, data: bytes, digest: str) -> pa.Table:
        """Raises when a segment is not what it should be."""
        if sha256(data) != digest:
            raise ValueError("its content is not what its name says")
        table = pq.read_table(io.BytesIO(data)).unify_dictionaries().combine_chunks()
        if table.schema != tables.INDEX or not table.num_rows:
            raise ValueError("it has other columns, or no rows")
        table.validate(full=True)
        scope, lengths = table["scope"].chunk(0), np.diff(table["outcomes"].chunk(0).offsets.to_numpy())
        sizes = np.array([self._sizes.get(about, -1) for about in scope.dictionary.to_pylist()])
        size_N, unit_N = sizes[scope.indices.to_numpy()], table["unit"].to_numpy()
        if ((size_N != lengths) & (size_N >= 0)).any() or unit_N.min() < 0 or unit_N.max() >= _MOST_UNITS:
            raise ValueError("it has other units")
        return table


def _level(name: str) -> int:
    return int(name.rpartition("/")[2].partition("-")[0])


def _joined(segments: Sequence[pa.Table]) -> pa.Table:
    """Their rows in one piece, by scope and unit, and of each unit once."""
    rows = pa.concat_tables(segments).unify_dictionaries().combine_chunks()
    scope_N = rows["scope"].chunk(0).indices.to_numpy().astype(np.int64)
    _, firsts = np.unique(scope_N * _MOST_UNITS + rows["unit"].to_numpy(), return_index=True)
    return rows.take(pa.array(firsts))
