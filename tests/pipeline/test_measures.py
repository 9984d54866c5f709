"""Measures: columns beside the images, computed on what exists; they decide nothing."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline.build import resolve
from pipeline.config import load
from stages import images
from stages.backbones.models import LoadedModels
from tests.local_build import HASH, accounts, config, fresh, packed, rows, run
from tests.small_build import listing, shard_hashes, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")

LIKELIHOOD = {"method": "likelihood", "steps": 1}
CIRCLES = [{"classes": ["circle"], "accepted": 4}]
COLUMNS = ("clip_score", "likelihood_log2p_per_dim", "similarity")


def samples(output):
    return {row["key"]: row for row in rows(output, "builds/*/shards")}


def test_the_columns_of_a_shard_are_what_the_measures_say_of_its_images(tmp_path, tangram):
    measure = ["clip_score", LIKELIHOOD, "similarity"]
    path = config(tmp_path, measure=measure, filter=[], targets=CIRCLES)
    run(path)
    ((stream,), models) = resolve(load(path))[1].streams, LoadedModels(torch.device("cpu"), tangram)
    packed, compared = samples(tmp_path / "out"), 0
    parts = [pq.read_table(part).to_pylist() for part in sorted((tmp_path / "out/parts").rglob("*.parquet"))]
    for part in parts:
        for batch in (part[:2], part[2:]):
            decoded = [images.to_tensor(images.decode(row["image"]), 64) for row in batch]
            for chosen in (f.method for f in stream.filters if f.kind == "measure"):
                found = chosen.score(models, torch.stack(decoded), stream.question)
                ((column, scores),) = found.items()
                name = column if column == chosen.name else f"{chosen.name}_{column}"
                for row, score in zip(batch, scores, strict=True):
                    if row["key"] in packed:
                        assert packed[row["key"]][name] == score
                        compared += 1
    assert compared == 4 * len(COLUMNS)


def test_a_measure_that_is_added_later_only_scores(tmp_path):
    path = config(tmp_path, targets=CIRCLES)
    first = run(path)
    before = listing(tmp_path / "out")
    kept = {name: facts for name, facts in before.items() if name.startswith(("parts/", "scores/"))}
    added = "measure=[clip_score, similarity]"
    assert set(packed(path, added)) == {"circle"}  # nothing is measured yet
    result = run(path, added)
    assert result.made
    assert result.units == 0
    after = listing(tmp_path / "out")
    assert {name: after[name] for name in kept} == kept
    new = {name for name in after.keys() - before.keys() if name.startswith(("parts/", "scores/"))}
    assert len(new) == 2 * len([name for name in kept if name.startswith("parts/")])
    assert all(name.startswith("scores/") for name in new)
    before, after = (
        {n: a.model_copy(update={"objects": ()}) for n, a in accounts(r).items()} for r in (first, result)
    )
    assert after == before
    for name, account in accounts(first).items():
        assert set(account.objects) < set(accounts(result)[name].objects)  # the scores came beside
    tars = [[shard.tar_sha256 for shard in r.manifest.shards] for r in (first, result)]
    assert tars[0] == tars[1]
    assert shard_hashes(result.manifest) == shard_hashes(fresh(tmp_path, path, added)[0].manifest)


def test_only_the_likelihood_is_of_a_backbone(tmp_path):
    path = config(tmp_path, measure=["clip_score", LIKELIHOOD, "similarity"], filter=[], targets=CIRCLES)
    ours, others = (
        {f.method.name: f.id for f in resolve(load(path, overrides))[1].streams[0].filters}
        for overrides in ([], ["backbone.dtype=bfloat16"])
    )
    assert {name for name in ours if ours[name] != others[name]} == {"likelihood"}


def test_a_measure_rejects_nothing_though_it_is_a_filter_that_would(tmp_path):
    path = config(tmp_path, filter=[], measure=[{"method": HASH, "least": 1}])
    result = run(path)
    for account in accounts(result).values():
        assert (account.accepted, account.missing, dict(account.rejected)) == (6, 0, {})
    for row in samples(tmp_path / "out").values():
        assert 0 <= row["tests_small_build_HashFilter_fraction"] < 1


def test_a_number_that_there_is_not_is_kept_as_such(tmp_path, seedloom):
    """A candidate whose one neighbour failed is like nobody: NaN, through scores, shards and their checks."""
    poisoned = {"method": "tests.small_build:Poisoned", "share": 0.3}
    path = config(
        tmp_path, recipes={"plain": sketch_recipe(generate=poisoned)}, filter=[], measure=["similarity"]
    )
    result = run(path)
    failed = {row["key"][:-9] for row in rows(tmp_path / "out") if row["status"] == "failed"}
    lone = 0
    for key, row in samples(tmp_path / "out").items():
        neighbour = f"{key[:-15]}{row['index'] ^ 1:06d}"
        assert math.isnan(row["similarity"]) == (neighbour in failed)
        lone += neighbour in failed
    assert 0 < lone < 18
    assert not run(path).made
    assert seedloom("verify", "--deep", tmp_path / "out").code == 0
    assert shard_hashes(result.manifest) == shard_hashes(fresh(tmp_path, path)[0].manifest)


def test_a_measured_image_is_made_again_to_the_same_bytes(tmp_path, seedloom):
    run(config(tmp_path, measure=["clip_score", "similarity"], targets=CIRCLES))
    key = min(samples(tmp_path / "out"))
    told = seedloom("reproduce", tmp_path / "out", key)
    assert (told.code, told.err) == (0, "")
    assert "the same bytes" in told.out


def test_the_schema_knows_the_key_and_its_methods(tmp_path, seedloom):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(seedloom("schema").out)
    content = yaml.safe_load(config(tmp_path).read_text())
    for measure in (["clip_score"], [LIKELIHOOD, {"method": "similarity", "model": "tangram"}]):
        jsonschema.validate({**content, "measure": measure}, schema)
    for measure in (["clip"], [{**LIKELIHOOD, "margin": 0}], [{**LIKELIHOOD, "steps": 0}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, "measure": measure}, schema)


def test_a_measure_that_there_is_not_is_refused_in_one_line(tmp_path, seedloom):
    told = seedloom("plan", config(tmp_path, measure=["clip"]))
    assert told.code == 2
    assert "measure.0: unknown measure method 'clip'; allowed: clip_score, likelihood, similarity" in told.err
