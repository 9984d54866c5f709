"""The index: whoever has it reads no part to resume, and whoever lost it, or is lied to, ends alike."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.build import make_runner
from pipeline import index as module
from pipeline import pack
from pipeline.build import blank, build, resolve, survey
from pipeline.config import load
from pipeline.index import Index
from pipeline.store import Store
from schemas.errors import UserError
from schemas.ids import sha256
from tests.local_build import HASH, OTHER, Silent, config, fresh, packed, run
from tests.small_build import parts_of, shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A build with candidates of all sorts, and its manifest; a segment has two units."""
    monkeypatch.setattr(module, "RECEIPTS", 2)
    poisoned = {"method": "tests.small_build:Poisoned", "share": 0.1}
    path = config(
        tmp_path,
        recipes={"plain": sketch_recipe(generate=poisoned)},
        filter=[{"method": HASH, "least": 0.5}, {"method": OTHER, "least": 0.3}],
        shard={"samples": 50},
    )
    return path, run(path).manifest


class Listening(Silent):
    """Telemetry that keeps what is said."""

    def __init__(self):
        self.lines: list[str] = []

    def say(self, text, **facts):
        self.lines.append(text)


def again(path: Path, listening: Listening | None = None):
    """The same build once more, as if it had been killed before its first shard."""
    shutil.rmtree(path.parent / "out" / "builds", ignore_errors=True)
    return build(load(path), listening or Silent(), make_runner)


def segments(path: Path) -> list[Path]:
    return sorted((path.parent / "out" / "index").rglob("*.parquet"))


def forge(path: Path, change) -> None:
    """Put one segment in place of all: their rows, changed, under the right hash."""
    table = pa.concat_tables([pq.read_table(segment) for segment in segments(path)])
    rows = [change(row) for row in table.to_pylist()]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    folder = segments(path)[0].parent
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / f"1-{sha256(file.getvalue())}.parquet").write_bytes(file.getvalue())


@pytest.fixture
def opened(monkeypatch) -> Counter[str]:
    """How often each part and each scores was opened."""
    from fsspec.implementations.local import LocalFileSystem

    counts: Counter[str] = Counter()
    plain = LocalFileSystem.open

    def counted(self, path, *given, **named):
        counts[str(path)] += 1
        return plain(self, path, *given, **named)

    monkeypatch.setattr(LocalFileSystem, "open", counted)
    return counts


def test_with_it_only_packing_reads_parts_and_each_once(made, opened):
    path, manifest = made
    result = again(path)
    assert result.manifest == manifest
    assert result.units == 0
    read = {name: count for name, count in opened.items() if "/parts/" in name or "/scores/" in name}
    assert set(read.values()) == {1}
    shards = [pq.read_table(p) for p in (path.parent / "out").glob("builds/*/shards/*.parquet")]
    accepted = {(row["stream"], row["unit"]) for table in shards for row in table.to_pylist()}
    assert len(read) == 3 * len(accepted)  # a part and two scores
    assert len(accepted) < len(parts_of(path.parent / "out"))  # some units have none, and are not read


@pytest.mark.parametrize("seed", range(4))
def test_whatever_of_it_is_lost_is_learned_again(made, seed):
    """As after a kill between two segments, or by hand."""
    path, manifest = made
    chance = random.Random(seed)
    there = segments(path)
    assert len(there) > 3
    for segment in chance.sample(there, chance.randint(1, len(there)) if seed else len(there)):
        segment.unlink()
    result = again(path)
    assert result.manifest == manifest
    assert result.units == 0
    store, plan = resolve(load(path))
    streams = blank(plan)
    Index(store, plan, print).teach(streams)
    assert all(stream.select().final for stream in streams.values())


@pytest.mark.parametrize("harm", ["a changed byte", "cut off", "no Parquet", "other columns", "other rows"])
def test_a_damaged_segment_is_told_in_a_line_and_made_again(made, harm):
    path, manifest = made
    victim = segments(path)[1]
    data = bytearray(victim.read_bytes())
    match harm:
        case "a changed byte":
            data[len(data) // 2] ^= 1
        case "cut off":
            del data[10:]
        case "other rows":  # whole in themselves, but not what the name says
            file, table = io.BytesIO(), pq.read_table(victim)
            pq.write_table(table.slice(1), file)
            data = bytearray(file.getvalue())
        case "no Parquet" | "other columns":
            file = io.BytesIO()
            pq.write_table(pa.table({"unit": [1]}), file)
            data = bytearray(b"x" if harm == "no Parquet" else file.getvalue())
            victim = victim.rename(victim.with_name(f"0-{sha256(bytes(data))}.parquet"))
    victim.write_bytes(data)
    listening = Listening()
    result = again(path, listening)
    assert result.manifest == manifest
    (line,) = [line for line in listening.lines if "damaged" in line]
    assert str(victim) in line
    assert not victim.exists() or sha256(victim.read_bytes()) in victim.name
    listening = Listening()
    again(path, listening)
    assert not [line for line in listening.lines if "damaged" in line]


@pytest.mark.parametrize("kind", ["parts", "scores"])
def test_a_removed_object_is_made_again_though_the_index_names_it(made, kind):
    path, manifest = made
    output = path.parent / "out"
    table = pq.read_table(next(output.glob("builds/*/shards/*.parquet")), columns=["stream", "unit"])
    chosen = {(row["stream"], row["unit"]) for row in table.to_pylist()[:3]}
    for stream, unit in chosen:
        victim = next((output / kind / stream).rglob(f"{unit:06d}.parquet"))
        victim.unlink()
    listening = Listening()
    result = again(path, listening)
    assert result.manifest == manifest
    assert result.units == (len(chosen) if kind == "parts" else 0)
    assert f"{len(chosen)} units are not as the index has them" in "".join(listening.lines)


def test_parts_that_change_again_and_again_are_told(made, monkeypatch):
    """Packing never finds what it needs: somebody removes it all the time."""
    path, _ = made
    shutil.rmtree(path.parent / "out" / "builds")

    def gone(store, plan, stream, unit):
        raise FileNotFoundError

    monkeypatch.setattr(pack, "read_unit", gone)
    with pytest.raises(UserError, match=r"parts/.+: it or its scores change during the build"):
        again(path)


@pytest.mark.parametrize("command", ["build", "pack"])
def test_candidates_that_it_calls_accepted_must_be(made, command):
    """A segment that is whole and lies: every candidate passed."""
    path, manifest = made
    forge(path, lambda row: {**row, "outcomes": ["passed"] * len(row["outcomes"])})
    shutil.rmtree(path.parent / "out" / "builds")
    result = packed(path) if command == "pack" else again(path)
    assert shard_hashes(result.manifest) == shard_hashes(manifest)
    if command == "build":  # nothing is left that contradicts what was learned then
        found = [row for segment in segments(path) for row in pq.read_table(segment).to_pylist()]
        assert len({(row["scope"], row["unit"]) for row in found}) == len(found)


def test_rows_that_do_not_fit_the_plan_are_damage(made):
    path, manifest = made
    forge(path, lambda row: {**row, "outcomes": row["outcomes"][:-1]})
    listening = Listening()
    assert again(path, listening).manifest == manifest
    assert "it has other units" in "".join(listening.lines)


def test_rows_of_others_are_left_alone(made):
    path, manifest = made
    forge(path, lambda row: {**row, "scope": row["scope"][::-1]})
    (other,) = segments(path)
    data = other.read_bytes()
    assert again(path).manifest == manifest
    assert other.read_bytes() == data


def test_thresholds_there_and_back_again(made, opened):
    path, manifest = made
    for least in (0.7, 0.2, 0.5):
        result = run(path, f"filter.0.least={least}")
        assert result.manifest == fresh(path.parent, path, f"filter.0.least={least}")[0].manifest
    assert result.manifest == manifest
    opened.clear()
    shutil.rmtree(path.parent / "out" / "builds")
    assert run(path, "filter.0.least=0.7").units == 0
    assert {count for name, count in opened.items() if "/parts/" in name} == {1}


def test_a_survey_is_what_parts_and_scores_say(made):
    path, _ = made
    store, plan = resolve(load(path))

    def known() -> dict[str, list]:
        streams = survey(store, plan, print).streams
        return {
            n: [s.units().tolist(), s.tally(), sorted(s.select().environments)] for n, s in streams.items()
        }

    before = known()
    segments(path)[0].unlink()
    assert known() == before
    shutil.rmtree(path.parent / "out" / "index")
    assert known() == before
    stream = plan.streams[0]
    removed = before[stream.id][0][1]
    again(path)
    next((path.parent / "out").glob(f"scores/{stream.id}/*/{removed:06d}.parquet")).unlink()
    assert known()[stream.id][0] == [unit for unit in before[stream.id][0] if unit != removed]


def test_pack_and_plan_write_no_index(made, seedloom):
    path, _ = made
    shutil.rmtree(path.parent / "out" / "index")
    shutil.rmtree(path.parent / "out" / "builds")
    assert json.loads(seedloom("plan", path, "--json").out)["streams"][0]["units_needed"] == 0
    assert packed(path).made
    assert not segments(path)


# --- the segments themselves --------------------------------------------------------------------------------

UNITS = 100


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A store in memory, and a plan of two streams of a hundred units and more."""
    monkeypatch.setattr(module, "RECEIPTS", 2)
    monkeypatch.setattr(module, "FAN", 3)
    uri = f"memory://{tmp_path.name}"
    targets = [{"classes": ["circle", "gear"], "accepted": 4 * UNITS, "attempts": 2}]
    return resolve(load(config(tmp_path, output=uri, targets=targets)))


def outcomes(unit: int) -> list[str]:
    return [("passed", "failed", "a.rule", "b.rule")[(unit * 7 + place * unit) % 4] for place in range(4)]


def told(store: Store, plan) -> dict[str, list]:
    """What another build is taught: units, counts and environments."""
    streams, lines = blank(plan), list[str]()
    Index(store, plan, lines.append).teach(streams)
    assert not lines
    return {n: [s.units().tolist(), s.tally(), s.select().environments] for n, s in streams.items()}


def expected(plan, units: set[tuple[str, int]]) -> dict[str, list]:
    streams = blank(plan)
    for name, unit in sorted(units):
        streams[name].learn(unit, outcomes(unit), f"machine {unit % 3}")
    return {n: [s.units().tolist(), s.tally(), s.select().environments] for n, s in streams.items()}


def objects(store: Store) -> list[str]:
    return [name for folder in store.list("index") for name in store.list(f"index/{folder}")]


def test_few_objects_hold_all_receipts_whatever_their_order_and_interruptions(small):
    store, plan = small
    everything = [(stream.id, unit) for stream in plan.streams for unit in range(UNITS)]
    random.Random(0).shuffle(everything)
    for start in range(0, len(everything), 40):  # five runs
        with Index(store, plan, print) as index:
            index.teach(blank(plan))
            for name, unit in everything[start : start + 40]:
                index.add(name, unit, outcomes(unit), f"machine {unit % 3}")
        assert told(store, plan) == expected(plan, set(everything[: start + 40]))
        levels = Counter(int(name.partition("-")[0]) for name in objects(store))
        assert max(levels.values()) < 3
    assert len(levels) > 2


def test_what_is_forgotten_stays_so_and_nothing_else(small):
    store, plan = small
    one, other = (stream.id for stream in plan.streams)
    units = {(name, unit) for name in (one, other) for unit in range(11)}
    with Index(store, plan, print) as index:
        index.teach(blank(plan))
        for name, unit in sorted(units):
            index.add(name, unit, outcomes(unit), f"machine {unit % 3}")
        gone = {(one, 0), (one, 10), (other, 3)}
        index.forget(gone)
        assert told(store, plan) == expected(plan, units - gone)
        index.add(one, 10, outcomes(10), "machine 1")
    assert told(store, plan) == expected(plan, units - gone | {(one, 10)})


def test_segments_that_are_merged_while_they_are_read_are_found(small, monkeypatch):
    store, plan = small
    name = plan.streams[0].id
    with Index(store, plan, print) as index:
        for unit in range(4):
            index.add(name, unit, outcomes(unit), f"machine {unit % 3}")
    assert len(objects(store)) == 2
    get = Store.get

    def merged_meanwhile(self, path):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "get", get)
            if len(objects(store)) == 2:
                with Index(store, plan, print) as other:
                    other.teach(blank(plan))
                    for unit in (4, 5):
                        other.add(name, unit, outcomes(unit), f"machine {unit % 3}")
        return get(self, path)

    monkeypatch.setattr(Store, "get", merged_meanwhile)
    monkeypatch.setattr("pipeline.store.THREADS", 1)
    found = told(store, plan)
    assert len(objects(store)) == 1
    assert found == expected(plan, {(name, unit) for unit in range(6)})


def test_a_write_that_fails_is_raised_and_not_lost(small, monkeypatch):
    store, plan = small

    def full(self, name, *pieces):
        raise OSError("the store is gone")

    monkeypatch.setattr(Store, "put_new", full)

    def use(error: Exception | None) -> None:
        with Index(store, plan, print) as index:
            index.add(plan.streams[0].id, 0, outcomes(0), "machine 0")
            if error:
                raise error

    with pytest.raises(OSError, match="the store is gone"):
        use(None)
    with pytest.raises(KeyError, match="what ended it"):
        use(KeyError("what ended it"))
