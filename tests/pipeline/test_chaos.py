"""One build under chaos; `python -m tests.chaos` makes many and prints their tally."""

from __future__ import annotations

import os

import pytest

from tests.chaos import calm, run


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_build_under_chaos_has_the_bytes_of_a_calm_one(drawings, tmp_path):
    expected = calm(tmp_path / "calm", drawings, tmp_path / "log")
    found, _, ends = run(1, tmp_path / "run", drawings, tmp_path / "log")
    assert found == expected
    assert ends["disk full"] == ends["0"] == 1
