"""Views: what a crop shows, and that a row's views come from its own chance alone."""

import pytest
import torch

from stages.contract import Chance
from stages.refine.views import SIDE, crop, draw_views

LIKE = torch.empty(0)
SIZE = 16


def streams(*indices):
    return [Chance(i, ("views",)).own() for i in indices]


def image(batch=1, seed=0):
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_crop_shows_the_window_that_was_asked_for():
    """Of a ramp, bilinear resampling gives the places themselves: start + (i + ½)·l/S − ½ for pixel i."""
    start_B, length_B = torch.tensor([0.0, 1.5, 3.0]).double(), torch.tensor([16.0, 12.0, 13.0]).double()
    matrix_BSS = crop(start_B, length_B, SIZE)
    ramp_S = torch.arange(SIZE).double()
    for matrix_SS, start, length in zip(matrix_BSS, start_B, length_B, strict=True):
        expected_S = (start + (ramp_S + 0.5) * length / SIZE - 0.5).clamp(0, SIZE - 1)
        torch.testing.assert_close(matrix_SS @ ramp_S, expected_S)
    torch.testing.assert_close(matrix_BSS.sum(dim=2), torch.ones(3, SIZE).double())
    assert torch.equal(matrix_BSS[0], torch.eye(SIZE).double())


def test_the_first_view_is_the_image_and_the_others_are_parts_of_it():
    """Seen by two ramps, a view says where its window lies and whether it is mirrored."""
    ramp = torch.arange(SIZE).float()
    both = torch.stack([ramp[:, None].expand(-1, SIZE), ramp.expand(SIZE, -1), ramp.expand(SIZE, -1)])[None]
    first, *others = draw_views(streams(5), 41, 0.0, SIZE, LIKE)
    assert torch.equal(first(both), both)
    mirrored = 0
    for view in others:
        down, across = view(both)[0, :2]
        slopes = float(down[9, 0] - down[8, 0]), float(across[0, 9] - across[0, 8])
        assert slopes[0] == pytest.approx(abs(slopes[1]), abs=1e-4)
        assert SIDE[0] - 1e-4 <= slopes[0] <= SIDE[1] + 1e-4
        assert down.min() >= 0
        assert down.max() <= SIZE - 1
        mirrored += slopes[1] < 0
    assert 10 < mirrored < 30
    assert len({float(view(both)[0, 0].min()) for view in others}) > 20


def test_noise_has_its_standard_deviation_and_differs_between_views():
    one, other = (view(torch.zeros(2, 3, 64, 64)) for view in draw_views(streams(1, 2), 2, 0.1, 64, LIKE))
    assert float(one.std()) == pytest.approx(0.1, rel=0.02)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_views_are_fixed_by_the_chance_and_differ_between_iterations():
    def seen(row, *indices):
        rows = streams(*indices)
        return [
            torch.stack([view(image().expand(len(rows), -1, -1, -1))[row] for view in views])
            for views in (draw_views(rows, 3, 0.05, SIZE, LIKE) for _ in range(3))
        ]

    alone = seen(0, 7)
    assert all(torch.equal(a, b) for a, b in zip(alone, seen(0, 7), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, seen(2, 4, 9, 7), strict=True))
    assert not torch.equal(alone[0], seen(0, 8)[0])
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[1], alone[2])
