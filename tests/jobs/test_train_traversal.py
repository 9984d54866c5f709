"""`seedloom train-traversal`: pairs are made once, what is measured was not learned from, and it resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import jobs.tangram.training as training
from jobs.train_traversal import HELD, Pairs, _chunks, describe, fit_network, measure, split, train_traversal
from schemas.errors import UserError
from schemas.ids import sha256
from stages.backbones.diffusion.folder import backbone_fingerprint
from stages.backbones.diffusion.settings import BackboneSettings
from stages.combine.direction import grey
from stages.combine.traversal import from_bytes
from stages.contract import Sampler
from stages.gaussianity import gaussianity
from stages.images import decode, encode, to_tensor
from stages.invert.measure import psnr
from tests.small_build import drawings  # noqa: F401  fixture


def train(out, folder, **options):
    defaults = {"task": "colourise", "images": folder, "n": 16, "model": "tangram", "inversion_steps": 1}
    defaults |= {"prompt": "a photo of a {class}", "steps": 3, "threads": 1}
    train_traversal(out=out, **(defaults | options))


def pairs_of(n, seed=0):
    z = torch.randn(2, n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Pairs("id", tuple(f"class {i}" for i in range(n)), tuple(bytes([i]) for i in range(n)), *z)


def test_every_eighth_pair_is_held_out_and_no_other():
    pairs = pairs_of(20)
    learned, held = split(pairs)
    assert [data[0] for data in held.files] == [0, 8, 16]
    assert {*learned.files, *held.files} == set(pairs.files)
    assert len(learned.files) == 17
    assert held.prompts[1] == "class 8"
    assert torch.equal(held.whole_NCHW[1], pairs.whole_NCHW[8])
    assert torch.equal(learned.degraded_NCHW[7], pairs.degraded_NCHW[9])  # 0 and 8 are left out before it


def test_chunks_are_of_one_class_each_and_equal(drawings, tmp_path):  # noqa: F811
    chunks = list(_chunks(drawings, 6, "a drawing of a {class}"))
    assert [(chunk.prompt, len(chunk.files)) for chunk in chunks] == [
        ("a drawing of a circle", 2), ("a drawing of a gear", 2), ("a drawing of a ring", 2),
    ]  # fmt: skip
    assert sum(len(chunk.files) for chunk in _chunks(drawings, 100, "{class}")) == 12  # all that there are


def test_a_file_carries_what_it_was_trained_for_and_what_it_is_worth(drawings, tmp_path, capsys):  # noqa: F811
    more = tmp_path / "images"
    for n, path in enumerate(sorted(drawings.glob("*/*.png"))):
        for copy in range(2):  # 24 images
            target = more / path.parent.name / f"{n}-{copy}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (more / "ring" / "notes.txt").write_text("no image")
    train(tmp_path / "out", more, n=24)
    out = capsys.readouterr().out
    file = tmp_path / "out" / "colourise.safetensors"
    network, about = from_bytes(file.read_bytes())
    assert network.d == 1024
    assert about["task"] == "colourise"
    assert about["backbone"] == backbone_fingerprint(BackboneSettings())
    assert about["invert"] == {"method": "ddim", "steps": 1, "guidance": 1.0}
    assert about["learnt_from"]["pairs"] == 21
    assert "1 files left out (ring/notes.txt" in out
    assert f"sha256 {sha256(file.read_bytes())}" in out
    firsts = [next(iter(sorted((more / name).glob("*.png")))) for name in ("circle", "gear", "ring")]
    truth = torch.stack([to_tensor(decode(path.read_bytes()), 64) for path in firsts])
    held = about["figures"]["input"]
    assert held == {"mean": pytest.approx(float(psnr(truth, grey(truth)).mean())), "n": 3}

    # the same again, of which every part is there: nothing is inverted, and no step is taken
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path != file}
    before = file.read_bytes()
    train(tmp_path / "out", more, n=24)
    assert file.read_bytes() == before
    assert "chunks" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made} == made

    # one file of pairs lost: made again, to the same bytes
    chunk = next(iter(sorted((tmp_path / "out" / "pairs").iterdir())))
    seeds = load_file(chunk)
    kept = chunk.read_bytes()
    chunk.unlink()
    train(tmp_path / "out", more, n=24)
    assert capsys.readouterr().out.count("chunks") == 1
    assert chunk.read_bytes() == kept
    assert not torch.equal(seeds["degraded_NCHW"], seeds["whole_NCHW"])

    # another task has pairs, a checkpoint and a file of its own, and so have other steps
    train(tmp_path / "out", more, n=24, task="inpaint")
    assert file.read_bytes() == before
    assert from_bytes((tmp_path / "out" / "inpaint.safetensors").read_bytes())[1]["task"] == "inpaint"
    assert len(list((tmp_path / "out" / "pairs").iterdir())) == 6  # three classes, two tasks
    train(tmp_path / "out", more, n=24, steps=4)
    assert file.read_bytes() != before
    assert len(list((tmp_path / "out").glob("checkpoint-*.pt"))) == 3


def test_the_traversed_seed_is_what_the_network_makes_of_the_degraded_one(gaussian_backbone):
    """One that knows the answer reaches the true seed and its image; one that does nothing, nothing."""
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    files = tuple(encode(image_hw3, "png", 100) for image_hw3 in images)
    z = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = Pairs("id", ("", ""), files, z[0], z[1])
    backbone, sampler = gaussian_backbone(), Sampler(2, 1.0)

    def knowing(z_1CHW):
        right_N = (pairs.degraded_NCHW == z_1CHW).flatten(1).all(dim=1)
        return pairs.whole_NCHW[right_N]

    figures = measure(backbone, sampler, "colourise", knowing, pairs)
    assert figures["traversed"] == figures["true"]
    assert figures["angle after"] == pytest.approx([0, 0], abs=1e-6)
    idle = measure(backbone, sampler, "colourise", lambda z_1CHW: z_1CHW, pairs)
    assert idle["traversed"] == idle["source"] == figures["source"] != idle["true"]
    cosine = F.cosine_similarity(z[0].flatten(1), z[1].flatten(1))
    assert idle["angle before"] == idle["angle after"] == pytest.approx(cosine.arccos().tolist())


def test_a_training_that_is_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    pairs = pairs_of(40)
    network = fit_network(pairs, tmp_path / "whole.pt", 210)
    undisturbed = network.state_dict()
    off = (network(pairs.degraded_NCHW) - pairs.whole_NCHW).abs().mean()
    assert off < 0.5 * (pairs.degraded_NCHW - pairs.whole_NCHW).abs().mean()
    replace, commits = training.os.replace, iter(range(10))

    def dying(source, target):
        if next(commits) == 1:
            raise KeyboardInterrupt  # the second checkpoint, at the last step, is not put in place
        replace(source, target)

    monkeypatch.setattr(training.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_network(pairs, tmp_path / "cut.pt", 210)
    monkeypatch.undo()
    resumed = fit_network(pairs, tmp_path / "cut.pt", 210).state_dict()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def test_a_truth_that_is_shorter_than_the_output_does_not_make_it_spiky(tmp_path):
    """What cannot be predicted must stay as Gaussian as it came."""
    source, other = torch.randn(2, 900, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs("id", ("",) * 900, (b"",) * 900, source, 0.5 * (0.6 * source + 0.8 * other))
    network = fit_network(pairs, tmp_path / "checkpoint.pt", 400)
    fresh = torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        kurtosis = [measures["kurtosis"] for measures in gaussianity(network(fresh))]
    assert abs(np.mean(kurtosis)) < 5 * (24 / 256 / 50) ** 0.5


def test_the_verdict_is_that_of_the_paired_interval():
    source = [15.0, 20.0, 25.0, 30.0]
    figures = {name: [1.0, 2.0, 3.0, 4.0] for name in ("input", "true", "angle before", "angle after")}

    def verdict(gains):
        traversed = [a + b for a, b in zip(source, gains, strict=True)]
        return describe("inpaint", {**figures, "source": source, "traversed": traversed}).splitlines()[-1]

    # between images the figures vary by ten times the gain, which the paired interval does not see
    assert "+" not in verdict([1.0, 1.1, 0.9, 1.0])
    assert verdict([1.0, 1.1, 0.9, 1.0]).endswith("1.00 [0.87, 1.13]: nearer")
    assert verdict([-1.0, -1.1, -0.9, -1.0]).endswith("farther")
    assert verdict([1.0, -1.0, 1.0, -1.0]).endswith("not shown")


def test_mistakes_are_one_line(drawings, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="no task 'sharpen': choose from colourise, super_resolve, inpaint"):
        train(tmp_path, drawings, task="sharpen")
    with pytest.raises(UserError, match=f"12 usable images; give {2 * HELD}"):
        train(tmp_path, drawings)
    with pytest.raises(UserError, match="does not exist"):
        train(tmp_path, tmp_path / "nowhere")
