"""The command line, as a person meets it: one line for a mistake, its exit code, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.small_build import listing, make_config, noise_recipe, seeds_recipe

ROOT = Path(__file__).parents[2]
TARGET = {"classes": ["circle"], "accepted": 6}


def target(**changes):
    return {"targets": [TARGET | changes]}


def recipe(**changes):
    return {"recipes": {"a": noise_recipe(**changes)}}


# {name: (what is changed in a good config, what the line must say)}
MISTAKES = {
    "unknown key": ({"recipies": {}}, "unknown key 'recipies'; allowed: backbone, filter, measure, name"),
    "unknown inner key": ({"shard": {"sample": 3}}, "shard: unknown key 'sample'; allowed: image, quality"),
    "wrong type": (target(accepted="many"), "targets.0.accepted: must be a whole number, given 'many'"),
    "half an image": (target(accepted=2.5), "targets.0.accepted: must be a whole number, given 2.5"),
    "yes for a number": (target(accepted=True), "targets.0.accepted: must be a number, given True"),
    "quota 0": (target(accepted=0), "targets.0.accepted: must be greater than or equal to 1, given 0"),
    "too few attempts": (target(attempts=0.5), "targets.0.attempts: must be greater than or equal to 1"),
    "no attempts": (target(attempts=float("nan")), "targets.0.attempts: must be a finite number"),
    "classes of no kind": (target(classes="circle"), "targets.0.classes: must be all, a list of classes, or"),
    "no classes": (target(classes=[]), "targets.0.classes: must be all, a list of classes, or"),
    "no such class": (target(classes=["hexagom"]), "no references of class 'hexagom'; classes there: circle"),
    "nothing rare": (target(classes={"fewer_than": 2}), "no class has fewer than 2 references"),
    "no targets": ({"targets": []}, "targets: must not be empty"),
    "targets not in a list": ({"targets": TARGET}, "targets: must be a list"),
    "two targets of one name": ({"targets": [TARGET, TARGET]}, "targets.1: 'circle' is asked for twice"),
    "one name twice": (target(classes=["circle", "circle"]), "targets.0: 'circle' is asked for twice"),
    "unknown recipe": (target(recipe="b"), "targets.0.recipe: unknown recipe 'b'; allowed: mixed"),
    "no share": (target(recipe={"mixed": 0}), "targets.0.recipe: must be the name of a recipe, or {NAME: SH"),
    "shares of nothing": (target(recipe={}), "targets.0.recipe: must be the name of a recipe, or"),
    "which recipe": ({"recipes": {"a": noise_recipe(), "b": noise_recipe()}}, "several recipes (a, b)"),
    "no recipes": ({"recipes": {}}, "recipes: must not be empty"),
    "unknown method": (recipe(combine="slurp"), "recipes.a.combine: unknown combine method 'slurp'; allowed"),
    "unnamed method": (recipe(combine={"mode": "centroid"}), "recipes.a.combine: must name a method, as in"),
    "method's unknown key": (recipe(combine={"method": "cog", "u": 1}), "recipes.a.combine: unknown key 'u'"),
    "method's wrong value": (
        recipe(combine={"method": "cog", "mode": "middle"}),
        "recipes.a.combine.mode: must be 'interpolation' or 'centroid', given 'middle'",
    ),
    "own class, no module": (recipe(generate={"method": "no.such:X"}), "'no.such:X' cannot be imported"),
    "own class, not there": (recipe(generate={"method": "tests.small_build:X"}), "has no attribute 'X'"),
    "own class, other kind": (
        recipe(generate={"method": "tests.small_build:HashFilter"}),
        "'tests.small_build:HashFilter' is not a subclass of stages.contract.Generate",
    ),
    "unit and batch": (recipe(unit=5), "recipes.a: unit must be a multiple of batch, given unit 5 and batch"),
    "invert for nothing": (recipe(invert="ddim"), "recipes.a: invert makes seeds that nothing uses: set com"),
    "filter twice": ({"filter": ["clip", "clip"]}, "filter: clip is listed twice"),
    "filter not in a list": ({"filter": {"method": "clip"}}, "filter: must be a list"),
    "threshold": ({"filter": [{"method": "clip", "margin": 3}]}, "filter.0.margin: must be less than or equ"),
    "unknown CLIP": ({"filter": [{"method": "clip", "model": "nope"}]}, "unknown clip model 'nope'; give ta"),
    "unknown classifier": (
        {"filter": [{"method": "classifier", "model": "nope"}]}, "unknown classifier 'nope'; give tangram",
    ),
    "prompt without class": ({"prompt": "a photo"}, "prompt: must contain {class} and no other braces"),
    "prompt with more": ({"prompt": "{class} {x}"}, "prompt: must contain {class} and no other braces"),
    "image format": ({"shard": {"image": "bmp"}}, "shard.image: must be 'jpeg', 'png' or 'webp', given 'bmp"),
    "runner": ({"run": {"runner": "slurm"}}, "run.runner: must be 'ray' or 'local', given 'slurm'"),
    "workers": ({"run": {"workers": 0}}, "run.workers: must be auto, or a whole number from 1 up, given 0"),
    "backbone": ({"backbone": {"model": "./no"}}, "backbone ./no: no such folder; give tangram"),
    "missing folder": ({"references": {"uri": "/no/where"}}, "references.uri: '/no/where' does not exist; g"),
    "no place for references": ({"references": {}}, "references.uri: is missing"),
    "kind of references": ({"references": {"kind": "zip", "uri": "x"}}, "unknown read method 'zip'; allowed"),
    "scheme of references": ({"references": {"uri": "foo://x"}}, "references.uri: 'foo://x' cannot be opene"),
    "too few references": (
        {"recipes": {"a": seeds_recipe(combine={"method": "cog", "mode": "centroid", "group": 9})}},
        "class 'circle' has 4 usable references, but cog in recipe 'a' needs 9; add images",
    ),
    "seeds of nothing": (
        {"references": None, "recipes": {"a": seeds_recipe()}},
        "class 'circle' has 0 usable references, but cog in recipe 'a' needs 2",
    ),
    "all of nothing": (
        {"references": None, **target(classes="all"), **recipe()}, "targets.0.classes: needs `references`",
    ),
    "one name for two": (
        {"references": None, **target(classes=["a_b", "a b"]), **recipe()}, "'a b' and 'a_b' both read 'a b'",
    ),
    "scheme of the output": ({"output": "foo://x"}, "output 'foo://x': not a usable URI"),
    "no output": ({"output": ""}, "output: must not be empty"),
}  # fmt: skip


def told(ended) -> str:
    """The one line of a user's mistake."""
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("seedloom: ")
    return ended.err


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(seedloom, tmp_path, drawings, mistake, command):
    change, line = MISTAKES[mistake]
    path = make_config(tmp_path, drawings, **target(), **change) if "targets" not in change else make_config(
        tmp_path, drawings, **change
    )  # fmt: skip
    assert line in told(seedloom(command, path))
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.yaml"]


def test_a_class_that_the_classifier_does_not_know(seedloom, tmp_path):
    path = make_config(tmp_path, targets=[TARGET | {"classes": ["gryphon"]}], filter=["classifier"])
    line = told(seedloom("build", path))
    assert "the classifier tangram does not know the class 'gryphon'; it knows circle" in line
    assert not (tmp_path / "out").exists()


def test_an_empty_class_folder(seedloom, tmp_path, references):
    (references / "octagon").mkdir()
    line = told(seedloom("build", make_config(tmp_path, references)))
    assert "the class folder 'octagon'" in line
    assert "has no files; put images into it or remove it" in line
    assert not (tmp_path / "out").exists()


def test_a_class_whose_files_are_all_bad(seedloom, tmp_path, references):
    (references / "octagon").mkdir()
    (references / "octagon" / "0.png").write_bytes(b"no image")
    line = told(seedloom("build", make_config(tmp_path, references, **target(classes="all"))))
    assert "class 'octagon' has 0 usable references" in line
    assert "none of its files could be used" in line


@pytest.mark.parametrize("below", ["", "/out"])
def test_an_output_that_cannot_be_written(seedloom, tmp_path, drawings, below):
    """Below a file, where even root cannot write."""
    (tmp_path / "file").write_text("kept")
    path = make_config(tmp_path, drawings, output=f"{tmp_path}/file{below}")
    assert "cannot be written (Not a directory); choose one that you may write" in told(
        seedloom("build", path)
    )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "not valid YAML"),
        ("", "a config is a mapping"),
        ("- a\n- b", "a config is a mapping"),
        ("name: a\nname: b", "'name' stands twice"),
        ("\tname: a", "not valid YAML"),
        ("output: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("output: \udcff", "not valid YAML"),
    ],
)
def test_bad_yaml(seedloom, tmp_path, text, line):
    path = tmp_path / "dataset.yaml"
    path.write_text(text, errors="surrogateescape")
    assert line in told(seedloom("build", path))
    assert str(path) in told(seedloom("plan", path))


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_no_config(seedloom, tmp_path, name):
    assert "cannot be read (" in told(seedloom("build", tmp_path / name))


@pytest.mark.parametrize("value", ["rng_seed", "rng_seed=[", "targets.7.accepted=2", "no.such=1"])
def test_a_bad_override(seedloom, tmp_path, drawings, value):
    told(seedloom("plan", make_config(tmp_path, drawings), "--set", value))


def test_a_mistake_has_its_exit_code_in_a_process_of_its_own(tmp_path, drawings):
    path = make_config(tmp_path, drawings, **target(accepted=0))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.build", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_outputs_without_builds(seedloom, tmp_path):
    status = seedloom("status", tmp_path)
    assert (status.code, status.out) == (0, f"{tmp_path}: no builds\n")
    for command in (["verify"], ["show"], ["reproduce", "key"]):
        line = told(seedloom(command[0], tmp_path, *command[1:]))
        assert "no complete build there; run `seedloom build` first" in line
    assert "no complete build 'abc'; builds there: none" in told(
        seedloom("verify", tmp_path, "--build", "abc")
    )


# --- what the commands do ---------------------------------------------------------------------------------


def test_init_gives_a_config_that_plans(seedloom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for template in ("few_shot", "long_tail"):
        made = seedloom("init", template, "--template", template)
        assert made.code == 0
        path = tmp_path / template / "dataset.yaml"
        assert f"seedloom build {template}/dataset.yaml" in made.out
        before = listing(tmp_path)
        plan = seedloom("plan", path)
        assert plan.code == 0, plan.err
        assert listing(tmp_path) == before


def test_init_takes_a_folder_of_any_name(seedloom, tmp_path):
    folder = tmp_path / "a: #b 'c'"
    assert seedloom("init", folder).code == 0
    config = yaml.safe_load((folder / "dataset.yaml").read_text())
    assert config["references"]["uri"] == f"{folder}/references"
    assert Path(config["output"]).is_relative_to(folder)
    assert seedloom("plan", folder / "dataset.yaml").code == 0


def test_init_overwrites_nothing(seedloom, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "is not empty; give a new folder" in told(seedloom("init", tmp_path))
    assert "is no folder" in told(seedloom("init", tmp_path / "mine"))
    assert "allowed are few_shot, long_tail" in told(seedloom("init", tmp_path / "x", "--template", "huge"))
    assert listing(tmp_path).keys() == {"mine"}


def test_the_schema_accepts_the_examples(seedloom):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(seedloom("schema").out)
    for path in sorted((ROOT / "jobs/configs").glob("*.yaml")):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


@pytest.fixture(scope="module")
def built(tmp_path_factory, drawings):
    """A finished build and its config. To be read only."""
    from jobs.build import make_runner
    from pipeline.build import build
    from pipeline.config import load
    from pipeline.telemetry import telemetry

    path = make_config(tmp_path_factory.mktemp("built"), drawings)
    build(load(path), telemetry("plain"), make_runner)
    return path


@pytest.fixture
def output(built):
    return built.parent / "out"


def test_a_plan_costs_nothing(seedloom, tmp_path, drawings, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("stages.backbones.diffusion.load.load_backbone", refuse)
    monkeypatch.setattr("stages.backbones.models.load_clip", refuse)
    monkeypatch.setattr("stages.backbones.models.load_classifier", refuse)
    path = make_config(tmp_path, drawings, filter=["clip", "classifier"])
    facts = json.loads(seedloom("plan", path, "--json").out)
    assert not facts["complete"]
    assert facts["seeds_to_invert"] == 12
    assert [s["candidates_at_most"] for s in facts["streams"]] == [48, 48, 48]
    assert [s["units_needed"] for s in facts["streams"]] == [2, 2, 2]
    assert facts["bytes_at_most"] > facts["bytes_at_least"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.yaml"]


def test_a_plan_says_what_is_there(seedloom, built, output):
    before = listing(output)
    facts = json.loads(seedloom("plan", built, "--json").out)
    assert facts["complete"]
    assert facts["seeds_to_invert"] == 0
    assert [s["accepted_there"] for s in facts["streams"]] == [6, 6, 6]
    assert [s["units_needed"] for s in facts["streams"]] == [0, 0, 0]
    assert facts["bytes_measured"]
    told = seedloom("plan", built)
    assert "complete, nothing to do" in told.out
    assert "12 admitted, 0 quarantined" in told.out
    assert listing(output) == before


def test_a_plan_warns_of_units_that_are_mostly_surplus(seedloom, tmp_path, drawings):
    told = seedloom("plan", make_config(tmp_path, drawings, **target(accepted=1)))
    assert "set recipes.mixed.unit lower" in " ".join(told.out.split())


def test_json_is_one_object_a_line(seedloom, tmp_path, drawings):
    path = make_config(tmp_path, drawings, recipes={"plain": noise_recipe()}, **target())
    lines = [json.loads(line) for line in seedloom("build", path, "--json").out.splitlines()]
    assert {line["event"] for line in lines} >= {"message", "phase", "progress", "targets", "complete"}
    assert lines[-1]["samples"] == 6
    assert lines[-1]["made"]
    again = json.loads(seedloom("build", path, "--json").out)
    assert (again["event"], again["made"], again["samples"]) == ("complete", False, 6)
    assert again["build"] == lines[-1]["build"]
    assert json.loads(seedloom("pack", path, "--json").out)["samples"] == 6


def test_show_draws_a_plane_through_the_seeds_of_a_class(seedloom, output, tmp_path):
    """Its middle is their centroid, drawn as the recipe draws."""
    from pipeline.ledger import named, replan
    from pipeline.store import Store
    from pipeline.worker import Worker
    from stages.combine.cog import cog
    from stages.contract import Order
    from stages.images import to_uint8

    shown = seedloom("show", output, "--subspace", "gear", "--points", 3, "--out", tmp_path / "plane.png")
    assert shown.code == 0, shown.err
    store = Store(str(output))
    plan = replan(store, named(store).build_id)
    worker = Worker(plan, str(output))
    stream = next(s for s in plan.streams if s.label == "gear")
    z_CHW = cog(worker.materials(stream.id).seeds.z_KCHW[:3])
    order = Order(stream.prompt, z_CHW[None].expand(stream.batch, -1, -1, -1))
    expected = to_uint8(worker.dags[stream.recipe].generate(worker.backbone, worker.models, order).image_B3hw)
    with Image.open(tmp_path / "plane.png") as image:
        assert image.size == (3 * 64, 3 * 64)
        middle = np.asarray(image)[64:128, 64:128].astype(int)
    assert np.abs(middle - expected[0].astype(int)).max() <= 1
    unknown = told(seedloom("show", output, "--subspace", "rose"))
    assert "no recipe of this class has seeds; classes that do: circle, gear, ring" in unknown


def test_status_shows_history_and_sums(seedloom, built, output):
    facts = json.loads(seedloom("status", output, "--json").out)
    (entry,) = facts["history"]
    assert facts["unfinished"] == {}
    assert facts["manifest"]["build_id"] == entry["build_id"]
    (output / "builds" / "half").mkdir()
    told = seedloom("status", output).out
    (output / "builds" / "half").rmdir()
    assert entry["build_id"] in told
    assert "half  not complete" in told
    assert "references 4 admitted, 0 quarantined" in told


def test_show_writes_a_picture_with_every_target(seedloom, output, tmp_path):
    path = tmp_path / "sheet.png"
    assert seedloom("show", output, "--out", path).code == 0
    with Image.open(path) as sheet:
        one_row = seedloom("show", output, "--out", tmp_path / "small.png", "--rows", 1)
        assert one_row.code == 0
        with Image.open(tmp_path / "small.png") as small:
            assert sheet.width == small.width
            assert sheet.height > small.height > 3 * 72  # three targets, one row of pictures each


def keys(output: Path) -> list[str]:
    import pyarrow.dataset

    files = [str(p) for p in sorted(output.glob("builds/*/shards/*.parquet"))]
    return pyarrow.dataset.dataset(files).to_table(columns=["key"]).column("key").to_pylist()


def test_reproduce_gives_the_same_bytes(seedloom, output, tmp_path):
    for key in keys(output)[::7]:
        told = seedloom("reproduce", output, key, "--out", tmp_path / "again.jpg")
        assert told.code == 0
        assert "made again: the same bytes" in told.out
        assert told.out.count("parent") == 2
        with Image.open(tmp_path / "again.jpg") as image:
            assert image.size == (64, 64)


def test_reproduce_notices_other_bytes(seedloom, output, monkeypatch):
    from stages.combine.cog import Cog

    key = keys(output)[0]
    monkeypatch.setattr(Cog, "__call__", lambda self, z_KCHW, weights, artifact: z_KCHW[0])
    told = seedloom("reproduce", output, key)
    assert told.code == 1
    assert "other bytes" in told.out


def test_reproduce_of_a_key_that_is_not_there(seedloom, output):
    assert "'nothing': no such candidate in build" in told(seedloom("reproduce", output, "nothing"))


def test_reproduce_refuses_other_methods_than_those_of_the_build(seedloom, output, monkeypatch):
    from stages.generate.text_to_image import TextToImage

    key = keys(output)[0]
    monkeypatch.setattr(TextToImage, "version", 99)
    assert "was made with other models or methods" in told(seedloom("reproduce", output, key))
