"""`seedloom verify`: whatever is changed in a build, it fails and names the file."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from schemas.ids import sha256
from schemas.manifest import Manifest
from tests.small_build import make_config, sketch_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a finished build. To be copied."""
    from jobs.build import make_runner
    from pipeline.build import build
    from pipeline.config import load
    from pipeline.telemetry import telemetry

    folder = tmp_path_factory.mktemp("whole")
    path = make_config(folder, recipes={"plain": sketch_recipe()})
    build(load(path), telemetry("plain"), make_runner)
    return folder / "out"


@pytest.fixture
def output(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


@pytest.fixture
def folder(output):
    (build,) = (output / "builds").iterdir()
    return build


def faults(ended) -> list[str]:
    assert ended.code == 1
    assert ended.err == ""
    *lines, last = ended.out.splitlines()
    assert last == f"{len(lines)} faults"
    return lines


def test_a_whole_build(seedloom, output):
    for arguments in ([], ["--deep"]):
        ended = seedloom("verify", output, *arguments)
        assert ended.code == 0
        assert "5 shards, 18 samples, no fault" in ended.out


def test_a_changed_byte_anywhere(seedloom, output, folder):
    """In every file of the build, the history and the hint to the newest."""
    rng = random.Random(0)
    files = [*sorted(p for p in folder.rglob("*") if p.is_file()), *(output / "history").iterdir()]
    files.append(output / "latest.json")
    assert len(files) == 16
    for path in files:
        data = path.read_bytes()
        for at in {0, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))}:
            changed = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            path.write_bytes(changed)
            lines = faults(seedloom("verify", output))
            assert any(str(path.relative_to(output)) in line for line in lines), (path, at, lines)
        path.write_bytes(data)
    assert seedloom("verify", output).code == 0


def test_a_truncated_file(seedloom, output, folder):
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file()]:
        data = path.read_bytes()
        for length in (0, len(data) - 1):
            path.write_bytes(data[:length])
            assert any(path.name in line for line in faults(seedloom("verify", output)))
        path.write_bytes(data)


def test_a_missing_file(seedloom, output, folder):
    for name in ("shards/000001.tar", "shards/000000.parquet", "config.yaml", "references.lock"):
        (folder / name).rename(output / "away")
        assert faults(seedloom("verify", output)) == [f"builds/{folder.name}/{name}: is missing"]
        (output / "away").rename(folder / name)


def test_a_missing_manifest_is_no_complete_build(seedloom, output, folder):
    (folder / "manifest.json").unlink()
    ended = seedloom("verify", output)
    assert ended.code == 2
    assert f"no complete build {folder.name!r}" in ended.err


def test_an_extra_shard(seedloom, output, folder):
    shutil.copy(folder / "shards/000000.tar", folder / "shards/000009.tar")
    assert faults(seedloom("verify", output)) == [
        f"builds/{folder.name}/shards/000009.tar: is not in the manifest"
    ]


def test_a_history_that_was_removed(seedloom, output):
    (output / "history/1.json").unlink()
    ended = seedloom("verify", output)
    assert ended.code == 2
    assert "no complete build there" in ended.err


def test_a_manifest_that_was_replaced(seedloom, output, folder):
    name = folder / "manifest.json"
    name.write_bytes(
        Manifest.from_bytes(name.read_bytes(), "x").model_copy(update={"name": "other"}).to_bytes()
    )
    lines = faults(seedloom("verify", output))
    assert lines == [f"builds/{folder.name}/manifest.json: is not the one that history/ records"]


def reshard(folder: Path, number: int, tar: bytes | None = None, table=None) -> None:
    """Replace files of a shard and make the manifest agree with their hashes, as a wrong writer would."""
    name = folder / "manifest.json"
    manifest = Manifest.from_bytes(name.read_bytes(), "x")
    shards = list(manifest.shards)
    if tar is not None:
        (folder / f"shards/{number:06d}.tar").write_bytes(tar)
        shards[number] = shards[number].model_copy(update={"tar_sha256": sha256(tar)})
    if table is not None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        (folder / f"shards/{number:06d}.parquet").write_bytes(buffer.getvalue())
        shards[number] = shards[number].model_copy(update={"parquet_sha256": sha256(buffer.getvalue())})
    name.write_bytes(manifest.model_copy(update={"shards": tuple(shards)}).to_bytes())


def test_a_tar_and_a_table_that_disagree(seedloom, output, folder):
    table = pq.read_table(folder / "shards/000000.parquet")
    tar = (folder / "shards/000000.tar").read_bytes()
    row = table.to_pylist()[0]

    reshard(folder, 0, table=table.slice(1))
    told = faults(seedloom("verify", output))
    assert any("3 rows, the manifest says 4" in line for line in told)
    assert any(f"{row['key']} is in the tar alone" in line for line in told)

    at = table.schema.get_field_index("offset")
    moved = table.set_column(at, "offset", [[offset + 1 for offset in table.column("offset").to_pylist()]])
    reshard(folder, 0, table=moved.cast(table.schema))
    assert any(
        f"{row['member']} is not where the parquet says" in line
        for line in faults(seedloom("verify", output))
    )

    image = bytearray(tar)
    image[row["offset"] + 5] ^= 1
    reshard(folder, 0, tar=bytes(image), table=table)
    told = faults(seedloom("verify", output))
    assert any(f"{row['member']} is not the image that the parquet describes" in line for line in told)


def test_deep_decodes_every_image(seedloom, output, folder):
    """An image that its hashes agree with, but that is none."""
    tar = bytearray((folder / "shards/000000.tar").read_bytes())
    table = pq.read_table(folder / "shards/000000.parquet")
    row = table.to_pylist()[2]
    span = slice(row["offset"], row["offset"] + row["length"])
    tar[span] = bytes(row["length"])
    hashes = table.column("image_sha256").to_pylist()
    hashes[2] = sha256(bytes(row["length"]))
    at = table.schema.get_field_index("image_sha256")
    reshard(folder, 0, tar=bytes(tar), table=table.set_column(at, "image_sha256", [hashes]))
    assert not any("decoded" in line for line in faults(seedloom("verify", output)))
    assert any(
        f"{row['member']} cannot be decoded" in line for line in faults(seedloom("verify", output, "--deep"))
    )


def test_a_sample_that_stands_in_two_shards(seedloom, output, folder):
    for suffix in ("tar", "parquet"):
        shutil.copy(folder / f"shards/000000.{suffix}", folder / f"shards/000001.{suffix}")
    reshard(folder, 1, tar=(folder / "shards/000001.tar").read_bytes())
    name = folder / "manifest.json"
    manifest = Manifest.from_bytes(name.read_bytes(), "x")
    shards = list(manifest.shards)
    shards[1] = shards[0].model_copy(update={"name": "000001"})
    name.write_bytes(manifest.model_copy(update={"shards": tuple(shards)}).to_bytes())
    assert any("stands in the build twice" in line for line in faults(seedloom("verify", output)))


def test_a_build_that_is_not_the_newest(seedloom, output, folder):
    (output / "latest.json").unlink()  # a hint: a crash right after the history entry may leave none
    assert seedloom("verify", output, "--build", folder.name).code == 0
    with tarfile.open(folder / "shards/000000.tar") as archive:
        assert archive.getnames() == sorted(archive.getnames())
