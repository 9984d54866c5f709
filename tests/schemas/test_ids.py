from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.ids import canonical, fingerprint, random_stream, slug

json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_like, min_size=2))
def test_canonical_does_not_depend_on_the_order_of_keys(content):
    assert canonical(content) == canonical(dict(reversed(content.items())))


def test_canonical_tells_values_apart_that_look_alike():
    values = [1, 1.5, "1", True, None, "null", [1], {"1": 1}, "", [], {}]
    assert len({canonical(value) for value in values}) == len(values)


def test_canonical_refuses_what_json_cannot_say():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            canonical({"score": value})


def test_fingerprint_changes_with_every_part_of_the_description():
    base = {"prompt": "a photo of a star", "references": ["a", "b"], "batch": 8}
    changed = [base | {"batch": 4}, base | {"references": ["b", "a"]}, base | {"prompt": ""}]
    assert len({fingerprint(description) for description in [base, *changed]}) == 4
    assert re.fullmatch("[0-9a-f]{20}", fingerprint(base))


def test_a_stream_is_set_by_its_whole_identity():
    identities = [(0, 5), (5, 0), ("0", 5), (0, "noise", 5), (0, "noise5"), ("noise", 0, 5), (5,)]
    drawn = {random_stream(*identity).integers(1 << 62) for identity in identities}
    assert len(drawn) == len(identities)
    assert random_stream(0, "noise", 5).integers(1 << 62) == random_stream(0, "noise", 5).integers(1 << 62)


def test_streams_of_neighbours_are_not_correlated():
    noise = np.stack([random_stream(7, "noise", "star", "plain", i).standard_normal(4096) for i in range(12)])
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert abs(correlation).max() < 5 / math.sqrt(4096)


@given(st.text())
def test_slug_is_safe_in_paths_and_keys(name):
    assert re.fullmatch("[A-Za-z0-9_-]{1,40}", slug(name))


def test_slug_keeps_what_it_can():
    assert slug("five_pointed-star") == "five_pointed-star"
    assert slug("../../etc/passwd") == "etc_passwd"
    assert len(slug("a" * 99, length=30)) == 30
