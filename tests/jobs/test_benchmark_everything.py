"""One command for every benchmark: it goes on after a failure, and says so."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from jobs.benchmarks import everything as command
from jobs.benchmarks.turns import tell


def good(number: int, out: Path) -> None:
    tell({"number": number}, f"told\n\n| a figure | {number} |", out)


def bad(out: Path) -> None:
    raise ArithmeticError("no such number\nsecond line")


def test_a_failure_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    chosen = [("first", good, {"number": 1}), ("broken", bad, {}), ("last", good, {"number": 2})]
    monkeypatch.setattr(command, "steps", lambda device: chosen)
    app = Typer()
    app.command()(command.everything)
    done = CliRunner().invoke(app, ["--out", str(tmp_path / "new")])
    assert done.exit_code == 1
    assert "failed: broken" in done.output
    text = (tmp_path / "new" / "results.md").read_text()
    assert text.index("## first") < text.index("| a figure | 1 |") < text.index("## broken")
    assert "**Failed**: ArithmeticError: no such number" in text
    assert "second line" not in text
    assert "| a figure | 2 |" in text
    assert "figures:" not in text
    assert sorted(p.name for p in (tmp_path / "new").glob("*.json")) == ["first.json", "last.json"]


def test_what_was_measured_is_kept_when_the_rest_is_stopped(tmp_path):
    def stopped(out: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command.run_all([("first", good, {"number": 1}), ("second", stopped, {})], tmp_path)
    assert "| a figure | 1 |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_are_those_of_the_commands(device):
    """A command would refuse at once, but only after the ones before it took their minutes."""
    chosen = command.steps(device)
    names = {name for name, _, _ in chosen}
    assert {"generate", "genie", "seedselect", "minority", "inversion", "shards"} <= names
    for _, benchmark, settings in chosen:
        assert {*settings, "out"} <= set(inspect.signature(benchmark).parameters)
