"""The long tail: splits, groups, losses and intervals are as defined; the command is whole."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats

from jobs.evaluate import small_network as net
from jobs.evaluate.long_tail import (
    AS_IT_IS,
    BASELINES,
    FILTERED,
    LOSSES,
    OWN,
    PLAIN,
    QUICK,
    REAL,
    _read,
    _repeated,
    _world,
    grouped,
)
from jobs.evaluate.metrics import difference, measure
from jobs.tangram.drawings import CLASSES
from schemas.errors import UserError
from tests.small_build import seedloom  # noqa: F401  fixture


def striped(count: int, classes: int = 2) -> net.Images:
    """Images of two classes that are easy to tell: bright above, and bright below."""
    pixels = torch.zeros(count, 3, net.SIDE, net.SIDE, dtype=torch.uint8)
    label_N = torch.arange(count) % classes
    pixels[label_N == 0, :, : net.SIDE // 2] = 250
    pixels[label_N == 1, :, net.SIDE // 2 :] = 250
    return net.Images(pixels, label_N)


def test_groups_are_by_the_number_of_training_images():
    found = grouped([500, 101, 100, 20, 19, 1])
    assert found == {"many": [0, 1], "medium": [2, 3], "few": [4, 5], "overall": [0, 1, 2, 3, 4, 5]}


def test_the_world_has_a_long_tail_and_no_image_twice(tmp_path):
    world = _world(tmp_path, QUICK)
    counts = [len(list((world / "train" / label).iterdir())) for label in CLASSES]
    assert (counts[0], counts[-1]) == (QUICK.most, QUICK.least)
    assert counts == sorted(counts, reverse=True)
    files = [path.read_bytes() for path in world.rglob("*.png")]
    assert len(set(files)) == len(files) == sum(counts) + 2 * QUICK.held_out * len(CLASSES)
    classes, train, judged = _read(world, "test")
    assert dict(zip(classes, train.counts(24), strict=True)) == dict(zip(CLASSES, counts, strict=True))
    assert judged.counts(24) == [QUICK.held_out] * 24


def test_few_classes_are_repeated_to_the_same_number():
    train = striped(9)  # five of one class, four of the other
    more = _repeated(train, [1], 6)
    assert more.counts(2) == [0, 6]
    rows = {image.numpy().tobytes() for image in more.pixels_N3hw}
    assert rows <= {image.numpy().tobytes() for image in train.pixels_N3hw}


def test_adjusted_logits_are_those_of_a_balanced_world():
    """log p(y|x) less log π_y is log p(x|y) but for what all classes share (Menon et al., Eq. 9)."""
    likelihood_NK = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).log()
    prior_K = net.log_prior([70, 20, 9, 1])
    posterior_NK = (likelihood_NK + prior_K).log_softmax(1)
    assert (net.adjusted(posterior_NK, prior_K).argmax(1) == likelihood_NK.argmax(1)).all()
    assert not (posterior_NK.argmax(1) == likelihood_NK.argmax(1)).all()  # else nothing was to be mended


def test_balanced_softmax_learns_what_the_prior_does_not_say():
    """Of images that tell nothing, cross-entropy learns the prior, Balanced Softmax that all are equal."""
    images = net.Images(torch.full((90, 3, 32, 32), 128, dtype=torch.uint8), torch.tensor([0, 0, 1] * 30))
    gaps = {}
    for loss in ("cross-entropy", "balanced softmax"):
        model = net.train(images, 2, loss=loss, augmentation="none", epochs=60, rng_seed=0)
        logit_K = net.logits(model, images)[0]
        gaps[loss] = float(logit_K[0] - logit_K[1])
    # not quite log 2, for each batch has other shares
    assert gaps["cross-entropy"] == pytest.approx(np.log(2), abs=0.25)
    assert gaps["balanced softmax"] == pytest.approx(0, abs=0.25)


def test_training_learns_and_repeats_itself():
    images = striped(64)
    models = [
        net.train(images, 2, loss="cross-entropy", augmentation="none", epochs=4, rng_seed=seed)
        for seed in (0, 0, 1)
    ]
    said = [net.logits(model, images) for model in models]
    assert net.accuracy_of_classes(said[0], images).tolist() == [1, 1]
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_weak_augmentation_moves_and_flips_and_strong_also_turns():
    image_3hw = torch.full((3, net.SIDE, net.SIDE), -1.0)
    image_3hw[:, 2:6, 14:18] = 1.0  # a spot above the middle
    batch = image_3hw.expand(200, -1, -1, -1)
    torch.manual_seed(0)
    places = {}
    for name in ("weak", "strong"):
        out = net._augment(name)(batch)[:, 0]
        rows, columns = out.amax(2).argmax(1).float(), out.amax(1).argmax(1).float()
        places[name] = (rows, columns)
    shift = net.SHIFT * net.SIDE
    assert places["weak"][0].max() <= 6 + shift
    assert (places["weak"][1] - 16).abs().max() <= 2 + shift + 1
    assert places["strong"][0].max() > 24  # it came to be below
    assert torch.equal(net._augment("none")(batch), batch)


def test_a_difference_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    other_S = rng.normal(0.5, 0.1, 5)
    one_S = other_S + rng.normal(0.05, 0.01, 5)  # the seeds differ more than the arms
    expected = stats.ttest_rel(one_S, other_S).confidence_interval(0.95)
    found = difference(one_S, other_S)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "higher"
    assert difference(other_S, one_S).verdict == "lower"
    assert difference(one_S, one_S[::-1]).verdict == "not shown"
    assert measure(one_S).n == 5


@pytest.mark.timeout(600)
def test_every_arm_has_its_figures_and_nothing_is_made_twice(seedloom, tmp_path):  # noqa: F811
    command = ("evaluate", "long-tail", "--quick", "--runner", "local", "--out", tmp_path)
    ended = seedloom(*command)
    assert ended.code == 0, ended.err
    rows = pq.read_table(tmp_path / "long-tail.parquet").to_pylist()
    arms = [*REAL, *BASELINES, PLAIN + FILTERED, OWN, OWN + FILTERED]
    assert {(r["table"], r["row"]) for r in rows} == {(loss, arm) for loss in LOSSES for arm in arms}
    assert all(0 <= r["value"] <= 1 for r in rows)
    assert {r["row"] for r in rows if r["build"]} == set(arms) - set(REAL)
    assert {r["metric"] for r in rows} == {"many", "medium", "few", "overall"}

    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(REAL) * 2 * QUICK.seeds < len(runs) <= len(arms) * 2 * QUICK.seeds  # equal sets are one
    again = seedloom(*command)
    assert again.code == 0, again.err
    assert again.err.count("nothing to do") == len(arms) - len(REAL)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == runs
    assert pq.read_table(tmp_path / "long-tail.parquet").to_pylist() == rows
    assert AS_IT_IS in again.out


def test_images_without_a_test_split_are_refused(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(UserError, match="give train, validation, test"):
        _read(tmp_path, "test")
