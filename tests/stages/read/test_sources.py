"""What all sources have in common: the same pictures give the same references, wherever they lie."""

import hashlib

import pytest

from schemas.errors import UserError
from stages import registry

KINDS = {
    "imagefolder": {},
    "webdataset": {"label": "txt"},
    "parquet": {},
    "huggingface": {},
}


def test_these_are_the_sources():
    assert sorted(KINDS) == registry.names("read")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_every_source_gives_the_same_references(kind, place, pictures, write, read, memory, tmp_path):
    uri = memory if place == "memory" else str(tmp_path)
    getattr(write, kind)(uri, pictures)
    items, admission = read(kind, uri, **KINDS[kind])
    assert not admission.quarantined
    expected = sorted((label, hashlib.sha256(data).hexdigest()) for (label, _), data in pictures.items())
    assert [(r.label, r.sha256) for r in admission.admitted] == expected
    assert {item.label: 0 for item in items} == {"red_star": 0, "Zürich tram": 0}
    assert sorted(item.read() for item in items) == sorted(pictures.values())


@pytest.mark.parametrize("kind", KINDS)
def test_origins_are_unique_ordered_and_survive_a_move(kind, pictures, write, read, tmp_path):
    found = []
    for root in (tmp_path / "a", tmp_path / "b" / "deeper"):
        getattr(write, kind)(str(root), pictures)
        items, admission = read(kind, f"{root}/", **KINDS[kind])  # a slash at the end changes nothing
        found.append(([item.origin for item in items], admission))
    assert found[0] == found[1]
    origins = found[0][0]
    assert origins == sorted(set(origins))
    assert str(tmp_path) not in "".join(origins)


@pytest.mark.parametrize("kind", KINDS)
def test_items_can_be_read_again_in_any_order(kind, pictures, write, read, tmp_path):
    getattr(write, kind)(str(tmp_path), pictures)
    items, _ = read(kind, tmp_path, **KINDS[kind])
    first = {item.origin: item.read() for item in items}
    assert {item.origin: item.read() for item in reversed(items)} == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uri", ["missing", "empty", "memory://nowhere", "nosuch://bucket/refs"])
def test_a_source_that_is_not_there_is_one_clear_line(kind, uri, read, tmp_path):
    (tmp_path / "empty").mkdir()
    uri = uri if "://" in uri else str(tmp_path / uri)
    with pytest.raises(UserError) as caught:
        read(kind, uri, **KINDS[kind])
    message = str(caught.value)
    assert message.startswith("references.uri: ")
    assert uri in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "settings",
    [
        {"per_class": 0},
        {"max_pixels": 0},
        {"max_bytes": 0},
        {"max_pixels": 10**9},
        {"uri": ""},
        {"colour": 1},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        registry.resolve("read", kind).Config(**{"uri": "x"} | settings)
