"""COG: Gaussian in, Gaussian out; and what a candidate draws."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.ids import random_stream
from stages.combine.cog import Cog, combine_cog

weight_rows = st.lists(st.floats(-5, 5), min_size=2, max_size=6).filter(
    lambda w: sum(x * x for x in w) > 1e-3
)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (3.0, 2.0), (-1.0, 0.3)])
@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (0.9, 0.1), (1 / 3,) * 3, (0.2,) * 5, (2.0, -1.0), (0.0, 4.0)]
)
def test_gaussian_seeds_give_gaussian_seeds(mean, deviation, weights):
    z_KCHW = mean + deviation * noise(len(weights), 4, 32, 32, seed=len(weights))
    combined = combine_cog(matrix(weights), z_KCHW, mean)[0].flatten().numpy()
    assert scipy.stats.kstest(combined, "norm", args=(mean, deviation)).pvalue > 1e-3
    assert combined.std() == pytest.approx(deviation, rel=0.05)
    assert combined.mean() == pytest.approx(mean, abs=0.08 * deviation)


def test_a_mean_and_a_covariance_of_any_shape_are_kept():
    """Over many draws of K correlated seeds the combination has the same mean and covariance as one seed."""
    shape_33 = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0.3, 2.0]], dtype=torch.float64)
    mean_CHW = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None, None]
    z_KCHW = mean_CHW + torch.einsum("cd,kdhw->kchw", shape_33, noise(4, 3, 200, 200))
    combined = combine_cog(matrix((0.1, 0.2, 0.3, 0.4)), z_KCHW, mean_CHW)[0].flatten(1)
    torch.testing.assert_close(combined.mean(1), mean_CHW.flatten(), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(combined), shape_33 @ shape_33.T, rtol=0, atol=0.1)


def test_plain_averages_fail_where_cog_passes():
    """What the transform is for: the mean of three unit Gaussians has variance 1/3."""
    z_KCHW = noise(3, 4, 32, 32)
    assert scipy.stats.kstest(z_KCHW.mean(0).flatten().numpy(), "norm").pvalue < 1e-9


@given(weights=weight_rows, scale=st.floats(1e-3, 1e3))
def test_without_a_mean_only_the_proportions_of_the_weights_matter(weights, scale):
    z_KCHW = noise(len(weights), 2, 3, 3)
    scaled = combine_cog(scale * matrix(weights), z_KCHW)
    torch.testing.assert_close(scaled, combine_cog(matrix(weights), z_KCHW))


@given(weights=weight_rows, mean=st.floats(-3, 3))
def test_one_seed_of_weight_one_is_itself_and_equal_seeds_follow_the_equation(weights, mean):
    z_KCHW = noise(len(weights), 2, 3, 3)
    one = matrix([1.0] + [0.0] * (len(weights) - 1))
    torch.testing.assert_close(combine_cog(one, z_KCHW, mean)[0], z_KCHW[0])
    alpha, beta = sum(weights), sum(w * w for w in weights)
    same_KCHW = z_KCHW[:1].expand_as(z_KCHW)
    expected = (1 - alpha / beta**0.5) * mean + alpha / beta**0.5 * z_KCHW[0]
    torch.testing.assert_close(combine_cog(matrix(weights), same_KCHW, mean)[0], expected)


@given(t=st.floats(0.01, 0.99))
def test_interpolation_runs_along_the_great_circle_at_arctan_speed(t):
    """METHODS §4d: at t the angle is atan(t/(1−t)), 18.4° at a quarter where SLERP has 22.5°."""
    a, b = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    a[0, 0, 0] = b[0, 1, 1] = 1
    z = combine_cog(matrix((1 - t, t)), torch.stack([a, b]))[0]
    assert float(torch.arctan2(z[0, 1, 1], z[0, 0, 0])) == pytest.approx(np.arctan(t / (1 - t)))
    assert float(z.norm()) == pytest.approx(1)


def test_rows_of_weights_are_separate():
    w_BK, z_KCHW = matrix((1, 2, 0), (0, 1, -1)), noise(3, 2, 3, 3)
    both = combine_cog(w_BK, z_KCHW)
    torch.testing.assert_close(both, torch.cat([combine_cog(w[None], z_KCHW) for w in w_BK]))


def test_a_row_of_zeros_is_refused():
    with pytest.raises(ValueError, match="all zero"):
        combine_cog(matrix((0.5, 0.5), (0.0, 0.0)), noise(2, 1, 2, 2))


def test_computed_in_double_and_returned_as_given():
    z_KCHW = noise(3, 2, 3, 3).float()
    w_BK = matrix((0.2, 0.3, 0.5))
    assert torch.equal(combine_cog(w_BK, z_KCHW), combine_cog(w_BK, z_KCHW.double()).float())


def test_interpolation_draws_distinct_pairs_and_uniform_fractions():
    method = Cog(Cog.Config())
    draws = [method.draw(random_stream(3, i), 4) for i in range(1000)]
    assert {draw.parents for draw in draws} == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    t = [draw.weights[1] for draw in draws]
    assert scipy.stats.kstest(t, "uniform").pvalue > 1e-3
    assert method.seeds_needed() == 2


def test_centroids_draw_groups_of_distinct_seeds_with_equal_weights():
    method = Cog(Cog.Config(mode="centroid", group=3))
    draws = [method.draw(random_stream(3, i), 5) for i in range(500)]
    assert len({draw.parents for draw in draws}) == 10  # 5 over 3
    assert all(len(set(draw.parents)) == 3 and draw.weights == (1 / 3,) * 3 for draw in draws)
    assert method.seeds_needed() == 3
    z_KCHW = noise(3, 4, 8, 8).float()
    expected = z_KCHW.double().sum(0) / 3**0.5
    torch.testing.assert_close(method(z_KCHW, draws[0].weights), expected.float())


def test_dirichlet_weights_make_every_centroid_another():
    method = Cog(Cog.Config(mode="centroid", group=3, weights="dirichlet"))
    draws = [method.draw(random_stream(3, i), 3) for i in range(500)]
    assert {draw.parents for draw in draws} == {(0, 1, 2)}
    assert len({draw.weights for draw in draws}) == 500
    weights = np.array([draw.weights for draw in draws])
    assert np.allclose(weights.sum(axis=1), 1)
    for column in weights.T:  # each weight of a uniform draw from the simplex is Beta(1, K − 1)
        assert scipy.stats.kstest(column, "beta", args=(1, 2)).pvalue > 1e-3


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Cog.Config(mode="centroid", group=1)
    with pytest.raises(ValidationError, match="'interpolation' or 'centroid'"):
        Cog.Config(mode="mean")
