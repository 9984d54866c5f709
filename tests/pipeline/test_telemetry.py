"""What a person sees: the targets that lack most, and at the end the last counts."""

from __future__ import annotations

import json

import pytest

from pipeline.telemetry import SHOWN, Bars, JsonLines, PlainLines, Tally, lacking_most


def tallies(*accepted: int) -> dict[str, Tally]:
    return {f"target {n:02d}": Tally(100, count, 1, 2) for n, count in enumerate(accepted)}


def test_those_that_lack_the_largest_share_are_shown():
    many = tallies(*range(50, 80)) | {"a small one": Tally(2, 0), "a large one": Tally(1000, 490)}
    shown = lacking_most(many)
    assert len(shown) == SHOWN
    assert {"a small one", "a large one", "target 00", "target 09"} <= set(shown)
    assert "target 10" not in shown
    assert shown == sorted(shown)
    assert lacking_most(tallies(3, 2)) == ["target 00", "target 01"]


@pytest.mark.parametrize("kind", [PlainLines, Bars])
def test_the_last_counts_are_told_though_only_changes_come(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = kind()
    shown.tallies(tallies(0, 0))
    shown.phase("generate", 3)
    for count in (7, 8, 9):
        shown.tallies({"target 01": Tally(100, count, 1, 2)})
        shown.advance(1)
    shown.close()
    last = capsys.readouterr().err
    assert "9/100" in last
    assert "target 00" in last


def test_a_plain_line_says_how_many_targets_it_leaves_out(capsys):
    shown = PlainLines()
    shown.phase("generate", 1)
    shown.tallies(tallies(*range(SHOWN + 5)))
    shown.advance(1)
    assert capsys.readouterr().err.endswith("; and 5 more\n")


def test_json_lines_tell_what_changed(capsys):
    shown = JsonLines()
    shown.tallies(tallies(1, 2))
    shown.tallies({"target 01": Tally(100, 3)})
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(first["targets"]) == ["target 00", "target 01"]
    assert second["targets"] == {"target 01": {"quota": 100, "accepted": 3, "rejected": 0, "failed": 0}}
