"""Geodesic sampling: a great circle at norm √d, and pairs dealt without repeats."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.geodesic import Geodesic, geodesic, unrank
from stages.contract import Chance

STREAM = (7, "combine", "rose", "rare")


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angle(a, b):
    a, b = a / a.norm(), b / b.norm()
    return float(2 * torch.arctan2((a - b).norm(), (a + b).norm()))


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), scale=st.floats(0.1, 10))
@settings(deadline=None)
def test_the_angle_is_the_fraction_and_the_norm_is_that_of_noise_whatever_the_seeds_norms(seed, t, scale):
    a, b = noise(2, 4, 4, 4, seed=seed)
    z = geodesic(a, scale * b, t)
    assert float(z.norm()) == pytest.approx(8, rel=1e-12)
    assert (angle(a, z), angle(z, b)) == pytest.approx((t * angle(a, b), (1 - t) * angle(a, b)), abs=1e-7)
    torch.testing.assert_close(geodesic(a, scale * b, 0.0), 8 * a / a.norm())
    torch.testing.assert_close(geodesic(a, scale * b, 1.0), 8 * b / b.norm())


def test_between_nearly_parallel_seeds_the_norm_is_kept_and_opposite_ones_are_refused():
    a, b = noise(2, 4, 4, 4)
    assert float(geodesic(a, a + 1e-2 * b, 0.5).norm()) == pytest.approx(8, rel=1e-14)
    torch.testing.assert_close(geodesic(a, 2 * a, 0.3), 8 * a / a.norm())
    with pytest.raises(ValueError, match="no great circle"):
        geodesic(a, -a, 0.5)


@pytest.mark.parametrize("seeds", [2, 3, 10, 45])
def test_pair_numbers_name_every_pair_once(seeds):
    numbered = [unrank(n) for n in range(seeds * (seeds - 1) // 2)]
    assert sorted(numbered) == list(combinations(range(seeds), 2))


def test_every_pair_comes_once_before_any_comes_again_and_rounds_differ():
    method = Geodesic(Geodesic.Config())
    drawn = [method.draw(Chance(i, STREAM), 6).parents for i in range(60)]
    rounds = [drawn[i : i + 15] for i in range(0, 60, 15)]
    assert all(sorted(r) == list(combinations(range(6), 2)) for r in rounds)
    assert len(set(map(tuple, rounds))) == 4


def test_the_order_of_pairs_is_uniform_and_the_streams_own():
    method = Geodesic(Geodesic.Config())
    first = [method.draw(Chance(0, (i, *STREAM)), 5).parents for i in range(2000)]
    _, counts = np.unique(first, axis=0, return_counts=True)
    assert len(counts) == 10
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_the_place_is_uniform_and_each_candidates_own():
    method = Geodesic(Geodesic.Config())
    t = [method.draw(Chance(i, STREAM), 3).weights[1] for i in range(2000)]
    assert scipy.stats.kstest(t, "uniform").pvalue > 1e-3
    assert len(set(t)) == 2000


def test_candidates_that_share_a_pair_count_as_one_deal():
    method = Geodesic(Geodesic.Config(points=3))
    drawn = [method.draw(Chance(i, STREAM), 4) for i in range(18)]
    for block in (drawn[i : i + 3] for i in range(0, 18, 3)):
        assert len({d.parents for d in block}) == 1
        assert [d.weights[1] for d in block] == [0.25, 0.5, 0.75]
    assert sorted({d.parents for d in drawn}) == list(combinations(range(4), 2))


def test_the_stage_goes_to_the_weight_of_the_second_parent():
    z_KCHW = noise(2, 4, 4, 4).float()
    assert torch.equal(
        Geodesic(Geodesic.Config())(z_KCHW, (0.7, 0.3), {}), geodesic(z_KCHW[0], z_KCHW[1], 0.3)
    )
