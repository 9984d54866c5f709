from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import Damaged
from schemas.sealed import seal, unseal

CONTENT = {"name": "klein Bär", "rows": [1, 2.5, None], "nested": {"b": True, "a": '\\ " \n'}, "é": ""}


def test_content_comes_back():
    assert unseal(seal(CONTENT), "x") == CONTENT


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_any_content_comes_back(content):
    content.pop("sha256", None)
    assert unseal(seal(content), "x") == content


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_every_changed_byte_is_found(mask):
    data = seal(CONTENT)
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
        with pytest.raises(Damaged, match=r"a/manifest.json"):
            unseal(changed, "a/manifest.json")


def test_every_lost_or_added_byte_is_found():
    data = seal(CONTENT)
    for at in range(len(data)):
        with pytest.raises(Damaged):
            unseal(data[:at], "x")
        with pytest.raises(Damaged):
            unseal(data[:at] + b" " + data[at:], "x")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'{"sha256": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_was_never_sealed_is_damaged(data):
    with pytest.raises(Damaged):
        unseal(data, "x")
