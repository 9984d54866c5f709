"""Statistics against values that are known, and when a difference counts as shown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from jobs.evaluate.metrics import (
    LEAST_GROUPS,
    RESAMPLES,
    SIDES,
    Moments,
    compare,
    diversity,
    estimate,
    frechet,
    frechet_to,
    mean_of,
    resamples,
    share,
    student,
)
from jobs.tangram.evaluate import wilson

rng_seeds = st.integers(0, 10**6)


def gaussian(rng, dimensions):
    """Moments that do not commute with another draw's."""
    root_DD = rng.standard_normal((dimensions, dimensions))
    return Moments(rng.standard_normal(dimensions), root_DD @ root_DD.T)


def test_frechet_distance_of_two_gaussians_with_diagonal_covariances():
    a = Moments(np.array([1.0, 0.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = Moments(np.array([0.0, 0.0, 4.0]), np.diag([4.0, 4.0, 1.0]))
    # |Δμ|² + Σ(σ_a − σ_b)²
    assert frechet(a, b) == pytest.approx((1 + 4) + (1 + 0 + 4))


@given(seed=rng_seeds, dimensions=st.integers(1, 8))
@settings(deadline=None)
def test_frechet_distance_of_any_two_gaussians(seed, dimensions):
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, dimensions), gaussian(rng, dimensions)
    cross = sqrtm(a.covariance_DD @ b.covariance_DD).real
    spread = a.covariance_DD + b.covariance_DD - 2 * cross
    expected = ((a.mean_D - b.mean_D) ** 2).sum() + np.trace(spread)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-6, abs=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_with_fewer_images_than_features():
    x_ND = np.random.default_rng(0).standard_normal((5, 20))
    moments = Moments.of(x_ND)
    assert frechet(moments, moments) == pytest.approx(0, abs=1e-6)
    assert frechet(moments, Moments.of(x_ND + 1)) == pytest.approx(20, rel=1e-6)


@given(seed=rng_seeds)
def test_a_row_that_counts_three_times_is_a_row_that_stands_three_times(seed):
    rng = np.random.default_rng(seed)
    x_ND, times_N = rng.standard_normal((6, 3)), rng.integers(0, 4, size=6)
    times_N[:2] = 1, 2
    counted, repeated = Moments.of(x_ND, times_N), Moments.of(np.repeat(x_ND, times_N, axis=0))
    np.testing.assert_allclose(counted.mean_D, repeated.mean_D, atol=1e-12)
    np.testing.assert_allclose(counted.covariance_DD, repeated.covariance_DD, atol=1e-12)
    np.testing.assert_allclose(repeated.covariance_DD, np.cov(np.repeat(x_ND, times_N, axis=0).T), atol=1e-12)


@pytest.mark.parametrize("dimensions", [2, 20])
def test_the_distance_of_each_resample_is_that_of_its_images(dimensions):
    rng = np.random.default_rng(1)
    x_ND = rng.standard_normal((12, dimensions))
    real = Moments.of(rng.standard_normal((50, dimensions)) + 0.3)
    times_RN = resamples(range(12))
    found_R = frechet_to(real, x_ND)(times_RN)
    for times_N, found in zip(times_RN, found_R, strict=True):
        drawn_ND = np.repeat(x_ND, times_N.astype(int), axis=0)
        assert found == pytest.approx(frechet(Moments.of(drawn_ND), real), abs=1e-6)


def test_resamples_draw_whole_groups_and_equal_groupings_alike():
    groups = [f"pair {i // 3}" for i in range(30)]
    times_RN = resamples(groups)
    assert times_RN.shape == (RESAMPLES + 1, 30)
    assert (times_RN[0] == 1).all()
    assert (times_RN[:, ::3] == times_RN[:, 1::3]).all()
    assert (times_RN[:, ::3] == times_RN[:, 2::3]).all()
    assert (times_RN.sum(axis=1) == 30).all()
    assert np.array_equal(times_RN, resamples(list(groups)))
    assert not np.array_equal(times_RN, resamples([f"other {i // 3}" for i in range(30)]))


def test_the_interval_of_a_mean_is_that_of_the_number_of_groups():
    """Thrice the same value from one pair is one observation."""
    x_G = np.random.default_rng(2).standard_normal(200)
    alone = estimate(mean_of(x_G), resamples(range(200)), 200)
    thrice = estimate(mean_of(np.repeat(x_G, 3)), resamples([i // 3 for i in range(600)]), 200)
    expected = SIDES * x_G.std(ddof=1) / 200**0.5
    assert (alone.high - alone.low) / 2 == pytest.approx(expected, rel=0.25)
    assert (thrice.high - thrice.low) / 2 == pytest.approx(expected, rel=0.25)
    assert (alone.value, thrice.value) == pytest.approx((x_G.mean(),) * 2)
    assert (alone.n, thrice.n) == (200, 600)


def test_an_interval_is_missed_about_once_in_twenty():
    rng = np.random.default_rng(3)
    outside = 0
    for number in range(400):
        groups = [(number, i) for i in range(30)]
        found = estimate(mean_of(rng.standard_normal(30)), resamples(groups), 30)
        outside += not found.low <= 0 <= found.high
    assert 400 * 0.02 < outside < 400 * 0.11


def test_a_share_counts_an_image_that_was_made_twice_once():
    hit_N = np.array([1.0] * 30 + [0.0] * 10)
    distinct_N = np.array([1.0, 0.0] * 20)
    found = share(hit_N, distinct_N, range(40))
    assert (found.value, found.n) == (15 / 20, 20)
    assert (found.low, found.high) == wilson(15, 20)


def test_a_paired_difference_is_shown_where_an_unpaired_one_is_not():
    rng = np.random.default_rng(4)
    x_N = rng.standard_normal(60)
    better = estimate(mean_of(x_N + 0.1), resamples(range(60)), 60)
    paired = estimate(mean_of(x_N), resamples(range(60)), 60)
    unpaired = estimate(mean_of(x_N), resamples(range(100, 160)), 60)
    assert compare(better, paired).verdict == "higher"
    assert compare(paired, better).verdict == "lower"
    assert compare(better, unpaired).verdict == "not shown"
    assert (
        compare(better, paired).value == pytest.approx(compare(better, unpaired).value) == pytest.approx(0.1)
    )


def test_equal_arms_are_not_shown_to_differ():
    x_N = np.ones(50)
    one = share(x_N, x_N, range(50))
    assert compare(one, one).verdict == "not shown"


def test_a_difference_that_is_certain_in_a_few_groups_is_not_shown():
    few = LEAST_GROUPS - 1
    one, other = (estimate(mean_of(np.full(few, value)), resamples(range(few)), few) for value in (1.0, 0.0))
    found = compare(one, other)
    assert (found.value, found.low, found.verdict) == (1, None, "not shown")


def test_diversity_is_the_mean_cosine_distance_within_classes():
    x_ND = np.array([[1.0, 0], [0, 2], [3, 0], [1, 1], [2, 2]])
    labels = ["a", "a", "a", "b", "b"]
    value = diversity(x_ND, labels)(np.ones((1, 5)))[0]
    assert value == pytest.approx(((1 + 0 + 1) / 3 + 0) / 2)
    # the second image twice: pairs 1-2 and 2-3 count twice, and 2 is not compared with itself
    twice = diversity(x_ND[:3], ["a"] * 3)(np.array([[1.0, 2, 1]]))[0]
    assert twice == pytest.approx((2 + 2 + 0) / 5)
    # a class of which nothing was drawn says nothing
    assert diversity(x_ND, labels)(np.array([[1.0, 1, 0, 0, 0]]))[0] == pytest.approx(1)


def test_students_interval():
    mean, low, high = student([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == mean - low == pytest.approx(4.302653 / 3**0.5)  # t at 2 degrees of freedom
    assert student([5.0]) == (5.0, None, None)
