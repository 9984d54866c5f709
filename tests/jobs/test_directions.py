"""`seedloom evaluate directions`: its averages, that it asks an image nothing of itself, and a quick run."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.evaluate.directions import (
    PHOTOGRAPHS,
    _photographs,
    directions,
    examine,
    moved_by_the_others,
    over_pairs,
)
from schemas.errors import UserError
from stages.contract import Sampler


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pairs_are_of_different_images_however_often_each_is_drawn():
    value = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 4.0], [2.0, 4.0, 9.0]])
    times = np.array([[1, 1, 1], [2, 0, 1], [0, 1, 2], [2, 1, 0], [3, 0, 0]], dtype=float)
    found = over_pairs(value)(times)
    assert found[0] == pytest.approx(7 / 3)
    # two of image 0 and one of image 2: of three pairs, the two of different images have 2 and the third none
    assert found[1:4].tolist() == pytest.approx([2.0, 4.0, 1.0])
    assert np.isnan(found[4])


def test_what_moves_an_image_comes_from_the_others_alone():
    z, edited = noise(0, 5, 4, 6, 6), noise(1, 5, 4, 6, 6)
    moved = moved_by_the_others(z, edited)
    changed = edited.clone()
    changed[2] = noise(2, 4, 6, 6)
    again = moved_by_the_others(z, changed)
    assert [torch.equal(a, b) for a, b in zip(moved, again, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_an_edit_that_is_one_offset_is_parallel_and_carries_over(gaussian_backbone):
    """On a model whose inversion is affine, with images that are equal under the box and noise elsewhere."""
    image = 0.5 * noise(0, 12, 3, 8, 8).clamp(-2, 2).float()
    image[:, :, 3:5, 3:5] = 0.0
    result, strips = examine(gaussian_backbone(mean=0.0, deviation=1.0), "any", "", image, Sampler(8, 1.0))
    rows = result.rows
    assert rows["box"]["angle"].value == pytest.approx(0, abs=1e-3)
    assert rows["random"]["angle"].value == pytest.approx(np.pi / 2, abs=5 / 256**0.5 / 66**0.5)
    assert result.differences["box", "box, another image's", "angle"].verdict == "lower"
    assert result.differences["box", "box, nothing done", "psnr"].verdict == "higher"
    nothing, moved, own = (
        rows[f"box{end}"]["psnr"].value for end in (", nothing done", "", ", its own seed")
    )
    assert nothing + 5 < moved < own
    assert [strip.edit for strip in strips] == ["blur", "grey", "box"]
    assert torch.equal(strips[2].pictures[0], image[0])
    assert strips[2].pictures[2][0, 3, 3] == 1


def test_the_photographs_are_there_in_colour_and_all_different():
    photographs = _photographs()
    small = [np.asarray(image.resize((16, 16))).astype(float) for image in photographs]
    assert len(small) == 10
    assert all(np.abs(pixels - pixels.mean(2, keepdims=True)).max() > 5 for pixels in small)
    assert len({pixels.tobytes() for pixels in small}) == 10


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(PHOTOGRAPHS, "no-such-package", ("a.png",))
    with pytest.raises(UserError, match="pip install no-such-package"):
        _photographs()


def test_a_quick_run_leaves_tables_and_a_picture_of_every_edit(tmp_path, capsys):
    directions(n=4, out=tmp_path, quick=True)
    table = pq.read_table(tmp_path / "directions.parquet").to_pylist()
    angles = {(r["table"], r["row"]): r["value"] for r in table if r["metric"] == "angle"}
    for name in ("circle", "photographs"):
        for edit in ("blur", "grey", "box"):
            assert 0 < angles[name, edit] < np.pi
            assert {r["metric"] for r in table if (r["table"], r["row"]) == (name, edit)} == {
                "angle", "tangents", "psnr", "norm",
            }  # fmt: skip
    verdicts = {r["verdict"] for r in pq.read_table(tmp_path / "directions_differences.parquet").to_pylist()}
    assert verdicts == {"not shown"}  # of four images nothing can be
    page = Image.open(tmp_path / "directions_sheet.png")
    assert page.size == (40 + 2 * (5 * 68 + 16), 34 + 3 * 68)
    assert "LDM 0.08" in capsys.readouterr().out
