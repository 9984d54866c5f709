"""`seedloom evaluate confusion`: what it writes is what targets read."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from jobs.evaluate.quotas import apportion, targets
from pipeline.config import load
from stages import images
from stages.backbones.classifier import load_classifier
from tests.small_build import CLASSES, drawings, make_config, references, seedloom  # noqa: F401  fixtures


@pytest.fixture
def matrix(tmp_path, references, seedloom):  # noqa: F811
    path = tmp_path / "confusion.parquet"
    ended = seedloom("evaluate", "confusion", make_config(tmp_path, references), "--out", path)
    assert ended.code == 0, ended.err
    return path


def test_a_share_is_the_mean_probability_over_the_references_of_a_class(matrix, references):  # noqa: F811
    rows = {(r["class"], r["predicted"]): r for r in pq.read_table(matrix).to_pylist()}
    classifier = load_classifier("tangram", torch.device("cpu"))
    assert len(rows) == len(CLASSES) * len(classifier.classes)
    pictures = [images.decode(p.read_bytes()) for p in sorted((references / "gear").iterdir())]
    with torch.no_grad():
        logits_NK = classifier.logits(torch.stack([images.to_tensor(p, 64) for p in pictures]))
    expected_K = logits_NK.double().softmax(dim=1).mean(dim=0)
    for name, share in zip(classifier.classes, expected_K, strict=True):
        assert rows["gear", name]["share"] == pytest.approx(float(share), rel=1e-6)
        assert rows["gear", name]["images"] == len(pictures)


def test_a_target_takes_its_most_confused_sources_from_it(tmp_path, references, matrix, seedloom):  # noqa: F811
    genie = {"generate": {"method": "genie", "steps": 2, "ratio": 0.5, "guidance": 1}, "unit": 2, "batch": 2}
    target = {"classes": "all", "accepted": 1, "sources": {"most_confused": 1, "matrix": str(matrix)}}
    planned = seedloom(
        "plan", make_config(tmp_path, references, recipes={"hard": genie}, targets=[target], filter=[])
    )
    assert planned.code == 0, planned.err


def test_a_class_that_the_classifier_lacks_is_named(tmp_path, references, seedloom):  # noqa: F811
    (references / "gear").rename(references / "cogwheel")
    ended = seedloom("evaluate", "confusion", make_config(tmp_path, references), "--out", tmp_path / "m")
    assert ended.code == 2
    assert "does not know the class 'cogwheel'" in ended.err
    assert not (tmp_path / "m").exists()


def test_the_next_targets_ask_for_weak_classes_and_build(tmp_path, references, seedloom):  # noqa: F811
    path, written = make_config(tmp_path, references), tmp_path / "targets.yaml"
    ended = seedloom(
        "evaluate", "confusion", path, "--out", tmp_path / "m", "--write-targets", written, "--images", 6
    )
    assert ended.code == 0, ended.err
    asked = yaml.safe_load(written.read_text())["targets"]
    assert sum(target["accepted"] for target in asked) == 6
    built = seedloom("build", make_config(tmp_path, references, targets=asked, filter=[]))
    assert built.code == 0, built.err


def test_quotas_follow_the_errors_and_pairs_start_from_what_a_class_is_taken_for(tmp_path, references):  # noqa: F811
    genie = {"generate": {"method": "genie", "steps": 2, "ratio": 0.5, "guidance": 1}, "unit": 2, "batch": 2}
    config = load(make_config(tmp_path, references, recipes={"plain": {"combine": "cog"}, "hard": genie},
                              targets=[{"classes": "all", "accepted": 1, "recipe": "plain"}]))  # fmt: skip
    table = {("gear", "ring"): 0.6, ("gear", "gear"): 0.4, ("ring", "gear"): 0.2, ("ring", "ring"): 0.8}
    rows = [{"class": c, "predicted": p, "share": s} for (c, p), s in table.items()]
    found = targets(config, rows, 16)
    assert [(t.get("classes"), t.get("pairs"), t["accepted"], list(t["recipe"])) for t in found] == [
        (["gear"], None, 6, ["plain"]),
        (["ring"], None, 2, ["plain"]),
        (None, [["ring", "gear"]], 6, ["hard"]),
        (None, [["gear", "ring"]], 2, ["hard"]),
    ]


def test_apportioned_counts_sum_to_the_total():
    assert apportion({"a": 1.0, "b": 1.0, "c": 1.0}, 4) == {"a": 2, "b": 1, "c": 1}
    assert apportion({"a": 0.99, "b": 0.01}, 2) == {"a": 2}
