"""The layers: imports run one way, downwards, and the folders inside stages/ do not know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("schemas", "stages", "pipeline", "jobs")  # from the ground up
WITH_RAY = {"pipeline/run_ray.py", "pipeline/metrics.py", "jobs/submit.py"}


def modules() -> list[Path]:
    return sorted(p for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it; of `from a import b`, both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_look_at():
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(LAYERS)
    assert "stages.backbones" in set(imports(ROOT / "stages/backbones/clip.py"))


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_imports_run_downwards(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    above = set(LAYERS[layer + 1 :]) | {"tests"}
    assert not names(path) & above


def test_schemas_are_plain_data():
    for path in (ROOT / "schemas").rglob("*.py"):
        assert not names(path) & {"torch", "ray", "diffusers", "transformers"}, path


def test_ray_stays_where_it_belongs():
    users = {relative(path) for path in modules() if "ray" in names(path)}
    assert {u for u in users if not u.startswith("jobs/benchmarks/")} <= WITH_RAY
    assert "pipeline/run_ray.py" in users


def test_folders_of_stages_do_not_import_each_other():
    for path in (ROOT / "stages").rglob("*/*.py"):
        own = path.relative_to(ROOT / "stages").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "stages" and len(parts) > 1 and (ROOT / "stages" / parts[1]).is_dir():
                assert parts[1] in {own, "backbones"}, f"{relative(path)} imports {name}"


def test_top_level_stage_modules_do_not_import_methods():
    """The registry finds them by name; everything else works on what it is given."""
    for path in (ROOT / "stages").glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            folder = parts[0] == "stages" and len(parts) > 1 and (ROOT / "stages" / parts[1]).is_dir()
            assert not folder, f"{relative(path)} imports {name}"


def test_no_module_carries_the_name_of_a_dependency():
    dependencies = {"ray", "torch", "datasets", "transformers", "diffusers", "webdataset", "typer", "fsspec"}
    at_the_top = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert not at_the_top & dependencies


def test_a_job_starts_as_a_module():
    """`python -m jobs.x`, not only through the console script; and it is the same command."""
    for job in ("plan", "schema"):
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_help_is_quick():
    """It imports no heavy library, so the first thing that a person sees comes at once."""
    heavy = ("torch", "ray", "diffusers", "transformers", "pyarrow", "datasets", "open_clip", "timm")
    code = (
        "import sys; sys.argv = ['seedloom', '--help']\n"
        "from jobs.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('heavy:', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "build" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"
