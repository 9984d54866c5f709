import io
import random
import re
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.shard import tar

NAMES = st.from_regex(r"[a-c0-9_-]{1,6}(/[a-c0-9_-]{1,6})?\.(jpg|cls|json)", fullmatch=True)
MEMBERS = st.dictionaries(NAMES, st.binary(max_size=1100), max_size=12)


def written(members: dict[str, bytes]) -> tuple[bytes, dict[str, tar.Span]]:
    pieces, spans = tar.pieces(members)
    return b"".join(pieces), spans


@settings(max_examples=40, deadline=None)
@given(MEMBERS, st.integers(0, 9))
def test_bytes_depend_on_names_and_contents_alone(members, order):
    shuffled = random.Random(order).sample(list(members.items()), len(members))
    assert written(dict(shuffled)) == written(members)


@settings(max_examples=40, deadline=None)
@given(MEMBERS)
def test_tarfile_reads_what_was_written(members):
    data, spans = written(members)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        read = archive.getmembers()
        assert [m.name for m in read] == sorted(members)
        for member in read:
            assert archive.extractfile(member).read() == members[member.name]
            assert (member.offset_data, member.size) == (spans[member.name].offset, spans[member.name].length)
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname, member.type) == ("", "", tarfile.REGTYPE)
    assert {name: data[s.offset : s.offset + s.length] for name, s in spans.items()} == members


def test_header_equals_that_of_tarfile():
    """Field by field what Python's own writer makes of the same member."""
    member = tarfile.TarInfo("shard/000001.jpg")
    member.size = 700
    expected = member.tobuf(tarfile.USTAR_FORMAT)
    assert written({"shard/000001.jpg": bytes(700)})[0][:512] == expected


def test_contents_are_not_copied():
    members = {f"{n:03d}.jpg": memoryview(bytes([n]) * (n + 1)) for n in range(4)}
    pieces, _ = tar.pieces(members)
    for content in members.values():
        assert sum(piece is content for piece in pieces) == 1


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
def test_the_tar_command_reads_it(tmp_path):
    members = {f"{n:03d}.{e}": random.Random(n).randbytes(n * 97) for n in range(9) for e in ("jpg", "cls")}
    (tmp_path / "x.tar").write_bytes(written(members)[0])
    done = subprocess.run(["tar", "-xvf", "x.tar"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(members)
    assert not done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in members} == members


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        ".jpg",
        "a.",
        "../a.jpg",
        "/a.jpg",
        "a//b.jpg",
        "a.b/c.jpg",
        "ä.jpg",
        "a b.jpg",
        "a\n.jpg",
        "x" * 97 + ".jpg",
    ],
)
def test_a_name_that_readers_would_split_otherwise_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        written({name: b""})


def test_the_longest_name():
    name = "x" * 96 + ".jpg"
    with tarfile.open(fileobj=io.BytesIO(written({name: b"1"})[0])) as archive:
        assert archive.getnames() == [name]


def test_a_member_too_long_for_its_header_is_refused():
    class Long(bytes):
        def __len__(self):
            return 8**11

    with pytest.raises(ValueError, match="fewer than 8589934592 are allowed"):
        written({"a.jpg": Long()})
