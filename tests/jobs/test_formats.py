"""Builds of older formats are read; what a newer seedloom wrote is refused in one line by every reader."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.train.dataset import open_dataset
from pipeline.parts import to_parquet
from schemas import manifest, tables
from schemas.errors import UserError
from schemas.ids import sha256
from schemas.sealed import seal, unseal
from tests.local_build import SKETCH, run
from tests.small_build import make_config

SAMPLES = 18

# What the first format had not, by the format that brought it.
COLUMNS = {
    2: ("combined_norm", "parents_cosine"),
    3: ("artifacts", "source", "source_class", "noise_ratio", "generate_trace"),
}


@pytest.fixture(scope="module")
def whole(tangram, tmp_path_factory) -> Path:
    """The output of a finished build. To be copied."""
    path = make_config(tmp_path_factory.mktemp("whole"), recipes=SKETCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
        run(path)
    return path.parent / "out"


@pytest.fixture
def output(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "out")


def rewrite(
    output: Path, table: Callable[[pa.Table], tuple[pa.Table, int]], content: Callable[[dict[str, Any]], None]
) -> None:
    """Change the shards' tables and the manifest of a build, and whatever has a hash of them."""
    (folder,) = (output / "builds").iterdir()
    changed = unseal((folder / "manifest.json").read_bytes(), "manifest")
    for shard in changed["shards"]:
        path = folder / "shards" / f"{shard['name']}.parquet"
        rows, version = table(pq.read_table(path))
        metadata = {"version": version, "build": folder.name}
        path.write_bytes(data := to_parquet(rows.to_pylist(), rows.schema.remove_metadata(), metadata))
        shard |= {"parquet_bytes": len(data), "parquet_sha256": sha256(data)}
    content(changed)
    (folder / "manifest.json").write_bytes(data := seal(changed))
    for name in ("history/1.json", "latest.json"):
        entry = unseal((output / name).read_bytes(), name) | {"manifest_sha256": sha256(data)}
        (output / name).write_bytes(seal(entry))


def age(output: Path, version: int) -> None:
    """Make a build what a seedloom of an older format would have written."""

    def table(rows: pa.Table) -> tuple[pa.Table, int]:
        if version < 3:
            artifact = pa.array([None] * rows.num_rows, pa.string())
            rows = rows.append_column("artifact", artifact)
        later = [name for since, names in COLUMNS.items() if since > version for name in names]
        return rows.drop_columns(later), version

    rewrite(output, table, lambda changed: age_manifest(changed, version))


def age_manifest(content: dict[str, Any], version: int) -> None:
    """Take out what the manifests of an older format had not."""
    content["version"] = version
    for target in content["targets"].values():
        if version < 3:
            del target["label"]
        for recipe in target["recipes"].values():
            del recipe["objects"]
            if version < 2:
                del recipe["seeds"]


READERS = (("verify", "--deep"), ("status",), ("diff",), ("export", "--license", "cc0-1.0"))


def read_by(seedloom: Any, output: Path, reader: tuple[str, ...]) -> Any:
    command, *options = reader
    more = {"diff": [output], "export": [output.parent / "exported"]}.get(command, [])
    return seedloom(command, output, *more, *options)


def assert_refused(seedloom: Any, output: Path, reader: tuple[str, ...], why: str) -> None:
    """In one line that says so, by a command and by the dataset of a training."""
    ended = read_by(seedloom, output, reader)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert f"{why}; upgrade to read it" in ended.err
    with pytest.raises(UserError, match="newer seedloom"):
        open_dataset(str(output))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_build_is_read(seedloom, output, version):
    age(output, version)
    said = {reader[0]: read_by(seedloom, output, reader) for reader in READERS}
    assert {command: ended.code for command, ended in said.items()} == dict.fromkeys(said, 0), said
    assert f"{SAMPLES} samples, no fault, every image decoded" in said["verify"].out
    assert f"the same {SAMPLES} samples" in said["diff"].out
    assert len(list((output.parent / "exported/shards").iterdir())) == 5
    dataset = open_dataset(str(output))
    assert sorted(dataset[row]["label"] for row in range(len(dataset))) == [0] * 6 + [1] * 6 + [2] * 6


def test_what_an_older_build_does_not_say_is_not_guessed(seedloom, output):
    """Which objects it needs: pruning beside it could take them."""
    age(output, 3)
    ended = seedloom("prune", output, "--dry-run")
    assert ended.code == 2
    assert "manifest is of an older format" in ended.err


def test_a_changed_byte_of_an_older_manifest_is_found(seedloom, output):
    age(output, 2)
    (folder,) = (output / "builds").iterdir()
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"small"', b'"smell"'))
    ended = seedloom("verify", output)
    assert ended.code == 1
    assert "manifest.json: damaged" in ended.out


def test_an_older_build_is_entered_into_the_history_as_it_lies_there(
    tmp_path, tangram, monkeypatch, seedloom
):
    """A crash left the manifest without its entry, and a newer seedloom ends that build."""
    monkeypatch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
    path = make_config(tmp_path, recipes=SKETCH)
    output = tmp_path / "out"
    run(path)
    rewrite(output, lambda rows: (rows, tables.VERSION), lambda changed: age_manifest(changed, 3))
    (output / "history/1.json").unlink()
    assert not run(path).made
    assert seedloom("verify", output).code == 0


@pytest.mark.parametrize("reader", [*READERS, ("prune", "--dry-run")], ids=lambda reader: reader[0])
def test_a_newer_manifest_is_refused_in_one_line(seedloom, output, reader):
    newer = manifest.VERSION + 1
    rewrite(
        output,
        lambda rows: (rows, tables.VERSION),
        lambda changed: changed.update(version=newer, invented_later=1),
    )
    assert_refused(seedloom, output, reader, f"manifest.json: written by a newer seedloom (format {newer})")


@pytest.mark.parametrize("reader", [r for r in READERS if r[0] != "status"], ids=lambda reader: reader[0])
def test_newer_shards_are_refused_in_one_line(seedloom, output, reader):
    """The manifest may have stayed as it is, for the two have versions of their own."""
    newer = tables.VERSION + 1
    rewrite(
        output,
        lambda rows: (rows.rename_columns({"offset": "start"}), newer),
        lambda changed: None,
    )
    assert_refused(seedloom, output, reader, f".parquet: written by a newer seedloom (format {newer})")
