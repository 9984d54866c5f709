"""COG: Gaussian in, Gaussian out; and what a candidate draws."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.combine.cog import Cog, cog
from stages.combine.slerp import slerp
from stages.combine.whiten import whiten
from stages.contract import Chance

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
    combined = cog(z_KCHW, matrix(weights), mean)[0].flatten().numpy()
    assert scipy.stats.kstest(combined, "norm", args=(mean, deviation)).pvalue > 1e-3
    assert combined.std() == pytest.approx(deviation, rel=0.05)
    assert combined.mean() == pytest.approx(mean, abs=0.08 * deviation)


def test_a_mean_and_a_covariance_of_any_shape_are_kept():
    """Over many draws of K correlated seeds the combination has the same mean and covariance as one seed."""
    shape_33 = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0.3, 2.0]], dtype=torch.float64)
    mean_CHW = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)[:, None, None]
    z_KCHW = mean_CHW + torch.einsum("cd,kdhw->kchw", shape_33, noise(4, 3, 200, 200))
    combined = cog(z_KCHW, matrix((0.1, 0.2, 0.3, 0.4)), mean_CHW)[0].flatten(1)
    torch.testing.assert_close(combined.mean(1), mean_CHW.flatten(), rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(combined), shape_33 @ shape_33.T, rtol=0, atol=0.1)


def test_plain_averages_fail_where_cog_passes():
    """What the transform is for: the mean of three unit Gaussians has variance 1/3."""
    z_KCHW = noise(3, 4, 32, 32)
    assert scipy.stats.kstest(z_KCHW.mean(0).flatten().numpy(), "norm").pvalue < 1e-9


@given(weights=weight_rows, scale=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_without_a_mean_only_the_proportions_of_the_weights_matter(weights, scale):
    z_KCHW = noise(len(weights), 2, 3, 3)
    scaled = cog(z_KCHW, scale * matrix(weights))
    torch.testing.assert_close(scaled, cog(z_KCHW, matrix(weights)))


@given(weights=weight_rows, mean=st.floats(-3, 3))
@settings(deadline=None)
def test_one_seed_of_weight_one_is_itself_and_equal_seeds_follow_the_equation(weights, mean):
    z_KCHW = noise(len(weights), 2, 3, 3)
    one = matrix([1.0] + [0.0] * (len(weights) - 1))
    torch.testing.assert_close(cog(z_KCHW, one, mean)[0], z_KCHW[0])
    alpha, beta = sum(weights), sum(w * w for w in weights)
    same_KCHW = z_KCHW[:1].expand_as(z_KCHW)
    expected = (1 - alpha / beta**0.5) * mean + alpha / beta**0.5 * z_KCHW[0]
    torch.testing.assert_close(cog(same_KCHW, matrix(weights), mean)[0], expected)


@given(t=st.floats(0.01, 0.99))
@settings(deadline=None)
def test_interpolation_runs_along_the_great_circle_at_arctan_speed(t):
    """At t the angle is atan(t/(1−t)), 18.4° at a quarter where SLERP has 22.5°."""
    a, b = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    a[0, 0, 0] = b[0, 1, 1] = 1
    z = cog(torch.stack([a, b]), matrix((1 - t, t)))[0]
    assert float(torch.arctan2(z[0, 1, 1], z[0, 0, 0])) == pytest.approx(np.arctan(t / (1 - t)))
    assert float(z.norm()) == pytest.approx(1)


def test_rows_of_weights_are_separate():
    w_BK, z_KCHW = matrix((1, 2, 0), (0, 1, -1)), noise(3, 2, 3, 3)
    both = cog(z_KCHW, w_BK)
    torch.testing.assert_close(both, torch.cat([cog(z_KCHW, w[None]) for w in w_BK]))


def test_a_row_of_zeros_is_refused():
    with pytest.raises(ValueError, match="all zero"):
        cog(noise(2, 1, 2, 2), matrix((0.5, 0.5), (0.0, 0.0)))


def test_computed_in_double_and_returned_as_given():
    z_KCHW = noise(3, 2, 3, 3).float()
    w_BK = matrix((0.2, 0.3, 0.5))
    assert torch.equal(cog(z_KCHW, w_BK), cog(z_KCHW.double(), w_BK).float())


def test_rows_and_sets_of_seeds_are_broadcast():
    z, w = noise(2, 1, 3, 4, 3, 3), noise(5, 3, seed=1)
    grid = cog(z, w, 0.5)
    assert grid.shape == (2, 5, 4, 3, 3)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(grid[i, j], cog(z[i, 0], w[j], 0.5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cog(z[:, 0], w[0]), torch.stack([cog(z[i, 0], w[0]) for i in range(2)]))
    torch.testing.assert_close(cog(z[0, 0]), cog(z[0, 0], torch.full((3,), 1 / 3, dtype=torch.float64)))


@given(seed=st.integers(0, 10**6), t=st.floats(0, 1), scale=st.floats(0.3, 3))
@settings(deadline=None)
def test_at_the_pace_of_the_angle_it_has_slerps_direction_and_its_own_norm(seed, t, scale):
    """The control: two methods on one great circle are compared where they are at one angle."""
    z_KCHW = noise(2, 4, 4, 4, seed=seed) * torch.tensor([1, scale]).double()[:, None, None, None]
    stage = Cog(Cog.Config(pace="angle"))
    z, on_circle = stage(z_KCHW, (1 - t, t), {}), slerp(z_KCHW[0], z_KCHW[1], t)
    torch.testing.assert_close(z / z.norm(), on_circle / on_circle.norm(), rtol=0, atol=1e-12)
    other = Cog(Cog.Config())(z_KCHW, (0.8, 0.2), {})
    assert float(other.norm()) == pytest.approx(float((0.8 * z_KCHW[0] + 0.2 * z_KCHW[1]).norm()) / 0.68**0.5)


def test_paces_agree_at_the_ends_and_in_the_middle_only():
    z_KCHW = noise(2, 4, 4, 4)
    own, angle = Cog(Cog.Config()), Cog(Cog.Config(pace="angle"))
    for t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(own(z_KCHW, (1 - t, t), {}), angle(z_KCHW, (1 - t, t), {}))
    a, b = torch.eye(64, dtype=torch.float64)[:2].reshape(2, 4, 4, 4)
    for stage, degrees in ((own, 18.434949), (angle, 22.5)):
        z = stage(torch.stack([a, b]), (0.75, 0.25), {})
        assert float(torch.rad2deg(torch.arctan2(z[0, 0, 1], z[0, 0, 0]))) == pytest.approx(degrees)


def test_interpolation_and_centroids_need_and_combine_their_seeds():
    z_KCHW = noise(3, 4, 8, 8).float()
    interpolation, centroid = Cog(Cog.Config(t=0.25)), Cog(Cog.Config(mode="centroid", group=3))
    assert (interpolation.seeds_needed(), centroid.seeds_needed()) == (2, 3)
    drawn = interpolation.draw(Chance(0, (3,)), 2)
    assert (drawn.parents, drawn.weights) == ((0, 1), (0.75, 0.25))
    expected = (0.75 * z_KCHW[0].double() + 0.25 * z_KCHW[1].double()) / (0.75**2 + 0.25**2) ** 0.5
    torch.testing.assert_close(interpolation(z_KCHW[:2], drawn.weights, {}), expected.float())
    drawn = centroid.draw(Chance(0, (3,)), 3)
    assert (drawn.parents, drawn.weights) == ((0, 1, 2), (1 / 3,) * 3)
    expected = z_KCHW.double().sum(0) / 3**0.5
    torch.testing.assert_close(centroid(z_KCHW, drawn.weights, {}), expected.float())


def test_whitened_interpolation_keeps_norm_root_d_all_the_way():
    z_KCHW = noise(2, 4, 8, 8) + 0.5 * noise(4, 8, 8, seed=1)
    for t in (0.0, 0.2, 0.5, 1.0):
        for pace in ("own", "angle"):
            stage = Cog(Cog.Config(whiten=True, pace=pace))
            assert float(stage(z_KCHW, (1 - t, t), {}).norm()) == pytest.approx(16)
    torch.testing.assert_close(stage(z_KCHW, (0.7, 0.3), {}), slerp(*whiten(z_KCHW), 0.3))


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        Cog.Config(mode="centroid", group=1)
    with pytest.raises(ValidationError, match="'interpolation' or 'centroid'"):
        Cog.Config(mode="mean")


def test_settings_of_the_other_mode_are_refused():
    with pytest.raises(ValidationError, match=r"pace = angle does nothing in mode centroid; leave it out"):
        Cog.Config(mode="centroid", pace="angle")
    with pytest.raises(ValidationError, match=r"group = 5 does nothing in mode interpolation"):
        Cog.Config(group=5)
    for chosen in ({"mode": "centroid", "group": 5}, {"pace": "angle", "points": 3}):
        written = Cog.Config(**chosen)
        assert Cog.Config(**written.model_dump()) == written  # as it stands in a manifest
