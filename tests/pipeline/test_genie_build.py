"""Builds whose images start from images of other classes: what their rows say, and what a plan refuses."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from pipeline.build import resolve
from pipeline.config import load
from pipeline.ledger import replan
from pipeline.references import fetch
from pipeline.store import Store
from pipeline.tensors import read_tensors
from schemas.errors import UserError
from stages import images
from stages.generate.genie_ada import choose
from tests.local_build import rows, run
from tests.small_build import make_config, noise_recipe

RATIOS = (0.5, 0.75, 1.0)
PER_CLASS = 4


def ada(**settings):
    generate = {"method": "genie_ada", "steps": 4, "guidance": 1, "ratios": list(RATIOS), **settings}
    return {"hard": noise_recipe(generate=generate, unit=2)}


def write_matrix(path: Path) -> str:
    table = pa.table({"class": ["ring", "gear"], "predicted": ["gear", "ring"], "share": [0.25, 0.125]})
    pq.write_table(table, path)
    return str(path)


class Built:
    def __init__(self, folder: Path, result):
        self.result, self.output = result, folder / "out"
        self.store = Store(str(self.output))
        self.plan = replan(self.store, result.manifest.build_id)
        self.streams = {stream.target: stream for stream in self.plan.streams}
        self.rows = defaultdict(list)  # target → rows of its parts, in the order of candidates
        for stream in self.plan.streams:
            for path in sorted((self.output / "parts" / stream.id).iterdir()):
                self.rows[stream.target] += pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def built(tmp_path_factory, drawings, tangram):
    """Pairs, a list of sources, and the sources of a matrix that is gone when the build is looked at."""
    folder = tmp_path_factory.mktemp("genie")
    matrix = write_matrix(folder / "confusion.parquet")
    targets = [
        {"pairs": [["gear", "circle"], ["ring", "circle"]], "accepted": 6},
        {"classes": ["gear"], "sources": ["ring", "circle"], "accepted": 10},
        {"classes": ["ring"], "sources": {"most_confused": 1, "matrix": matrix}, "accepted": 2},
    ]
    path = make_config(folder, drawings, recipes=ada(), targets=targets, filter=[])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
        result = run(path)
    Path(matrix).unlink()
    return Built(folder, result)


SOURCES = {
    "gear -> circle": {"gear"},
    "ring -> circle": {"ring"},
    "gear": {"circle", "ring"},
    "ring": {"gear"},
}


def test_each_row_says_what_it_started_from_and_by_what_its_ratio_was_chosen(built):
    assert built.rows.keys() == SOURCES.keys()
    for target, sources in SOURCES.items():
        for row in built.rows[target]:
            assert row["status"] == "ok"
            assert row["source_class"] in sources
            assert row["source"] in {r.sha256 for r in built.plan.lock.classes[row["source_class"]]}
            assert len(row["generate_trace"]) == len(RATIOS)
            (chosen,) = choose(torch.tensor([row["generate_trace"]], dtype=torch.float64))
            assert row["noise_ratio"] == RATIOS[chosen]
            assert row["artifacts"] == [built.streams[target].artifacts["generate"]]
            assert row["parents"] == []
    traces = [tuple(row["generate_trace"]) for found in built.rows.values() for row in found]
    assert len(set(traces)) == len(traces)


def test_the_samples_say_the_same(built):
    candidates = {row["key"]: row for found in built.rows.values() for row in found}
    samples = rows(built.output, "builds")
    assert Counter(row["class"] for row in samples) == {"circle": 12, "gear": 10, "ring": 2}
    for row in samples:
        for column in ("source", "source_class", "noise_ratio", "generate_trace"):
            assert row[column] == candidates[row["key"]][column]


def test_every_source_is_used_once_before_any_is_used_twice(built):
    for target, sources in SOURCES.items():
        used = [row["source"] for row in built.rows[target]]
        turn = PER_CLASS * len(sources)
        for start in range(0, len(used), turn):
            assert max(Counter(used[start : start + turn]).values()) == 1
    assert len({row["source"] for row in built.rows["gear"]}) == 8
    assert len(built.rows["gear"]) == 10


def test_the_target_is_known_by_the_features_of_its_own_references(built, models):
    """And by nothing else: pairs of one class share what was made for it."""
    circle = {built.streams[f"{source} -> circle"].artifacts["generate"] for source in ("gear", "ring")}
    made = {path.name: path for path in (built.output / "artifacts").iterdir()}
    assert len(circle) == 1
    assert len(made) == 3
    for target, stream in built.streams.items():
        name = f"artifacts/{stream.artifacts['generate']}/artifact.safetensors"
        target_E = read_tensors(built.store, name)["target_E"]
        own = built.plan.lock.classes[stream.label]
        pixels = [images.to_tensor(images.decode(fetch(built.store, r.sha256)), 64) for r in own]
        with torch.no_grad():
            z_NE = F.normalize(models.extractor("tangram").features(torch.stack(pixels)), dim=1)
        torch.testing.assert_close(target_E, z_NE.mean(dim=0), rtol=1e-4, atol=1e-6, msg=target)


def test_the_extractor_is_among_the_models_of_the_build(built, models):
    assert built.plan.models["extractor tangram"] == models.fingerprint("extractor", "tangram")


# --- plans ------------------------------------------------------------------------------------------------


def planned(folder, references, **changes):
    target = {"classes": ["circle"], "accepted": 2}
    path = make_config(folder, references, **{"recipes": ada(), "targets": [target], "filter": [], **changes})
    return resolve(load(path))[1]


def test_other_extractors_and_ratios_make_other_images_and_only_extractors_other_artifacts(
    tmp_path, drawings
):
    one, ratios, extractor = (
        planned(tmp_path, drawings, recipes=ada(**settings)).streams[0]
        for settings in ({}, {"ratios": [0.5, 1.0]}, {"extractor": "clip:tangram"})
    )
    assert len({one.id, ratios.id, extractor.id}) == 3
    assert one.artifacts == ratios.artifacts != extractor.artifacts


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"targets": [{"pairs": [["gear", "gear"]], "accepted": 1}]}, "'gear' is both source and target"),
        ({"targets": [{"pairs": [["rose", "gear"]], "accepted": 1}]}, "no references of class 'rose'"),
        ({"targets": [{"classes": ["rose"], "accepted": 1}]}, "no references of class 'rose'"),
        (
            {"targets": [{"classes": ["empty"], "accepted": 1}]},
            "class 'empty' has 0 usable references, but genie_ada in recipe 'hard' needs 1;",
        ),
        (
            {"targets": [{"classes": ["gear"], "sources": ["empty"], "accepted": 1}]},
            "no usable references of 'empty', from which 'gear' is to be made",
        ),
        (
            {"recipes": {"hard": {**ada()["hard"], "combine": "cog"}}},
            "recipes.hard: combine makes seeds, but genie_ada starts from images: leave one of them out",
        ),
        (
            {"recipes": {"hard": {"generate": "genie", "combine": "cog"}}},
            "recipes.hard: combine makes seeds, but genie starts from images: leave one of them out",
        ),
        ({"recipes": ada(ratios=[])}, "recipes.hard.generate.ratios: must be at least 2 to choose from"),
        (
            {"recipes": ada(ratios=[0.8])},
            "ratios: must be at least 2 to choose from, given 0.8; genie has one",
        ),
        ({"recipes": ada(ratios=[0.0, 0.8])}, "generate.ratios: must be above 0 to 1, given 0, 0.8"),
        ({"recipes": ada(ratios=[0.8, 1.2])}, "generate.ratios: must be above 0 to 1, given 0.8, 1.2"),
        ({"recipes": ada(ratios="high")}, "generate.ratios: must be a list, given 'high'"),
        ({"recipes": ada(ratios=[0.5, 0.6])}, "noise ratios 0.5 and 0.6 both make 2 of 4 steps"),
        (
            {"recipes": ada(extractor="unisiam")},
            "unknown extractor 'unisiam'; give tangram, clip:NAME, a folder",
        ),
    ],
)
def test_a_plan_refuses_what_cannot_be_made_in_one_line(tmp_path, references, changes, line):
    (references / "empty").mkdir()
    (references / "empty" / "0000.png").touch()
    with pytest.raises(UserError) as caught:
        planned(tmp_path, references, **changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
