"""The spherical geometric median against what defines it: the smallest sum of angles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.geometric_median import geometric_median
from stages.combine.mean import normalized
from stages.combine.slerp import slerp

rng_seeds = st.integers(0, 10**6)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def angles(c, z):
    c, z = c.flatten(-3), z.flatten(-3)
    c, z = c / c.norm(dim=-1, keepdim=True), z / z.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((z - c).norm(dim=-1), (z + c).norm(dim=-1))


def cost(c, z, w):
    return float((w * angles(c, z)).sum())


def at(direction):
    """The same direction at the median's norm, for 4×4×4 latents."""
    return direction * 63**0.5 / direction.norm()


def orthonormal(k, shape=(4, 4, 4)):
    return torch.eye(64, dtype=torch.float64)[:k].reshape(k, *shape)


def tilted(degrees):
    """Three directions on a cone of this half-angle, evenly around it."""
    z = torch.zeros(3, 64, dtype=torch.float64)
    for k in range(3):
        around = 2 * math.pi * k / 3
        z[k, 0] = math.cos(math.radians(degrees))
        z[k, 1] = math.sin(math.radians(degrees)) * math.cos(around)
        z[k, 2] = math.sin(math.radians(degrees)) * math.sin(around)
    return z.reshape(3, 4, 4, 4)


def test_three_orthonormal_seeds():
    middle = geometric_median(orthonormal(3))
    torch.testing.assert_close(
        middle.flatten()[:3], torch.full((3,), 21**0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert torch.rad2deg(angles(middle, orthonormal(3))).tolist() == pytest.approx([54.7356103] * 3)


@given(seed=rng_seeds, k=st.integers(3, 7), spread=st.floats(0, 1.5))
@settings(deadline=None, max_examples=60)
def test_no_point_around_is_better_in_the_span_or_out_of_it(seed, k, spread):
    """Whether the median is between the seeds or one of them. Seeds with small and with usual angles."""
    z = noise(k, 4, 4, 4, seed=seed) + 2 * (1.5 - spread) * noise(4, 4, 4, seed=seed + 1)
    w = noise(k, seed=seed + 2).abs() + 0.3
    w = w / w.sum()
    middle = geometric_median(z, w)
    radius = float(middle.norm())
    assert radius == pytest.approx(63**0.5, rel=1e-12)
    inside = torch.einsum("nk,kchw->nchw", noise(8, k, seed=seed + 3), z)
    for step in torch.cat([inside, z, noise(8, 4, 4, 4, seed=seed + 4)]):
        step = step - (step * middle).sum() / radius**2 * middle
        if float(step.norm()) < 1e-6:  # the seed that is the median itself
            continue
        step = step / step.norm()
        for x in (1e-4, 1e-2, 0.1, 1.0, -1e-4, -1e-2, -0.1):
            moved = math.cos(x) * middle + math.sin(x) * radius * step
            assert cost(moved, z, w) > cost(middle, z, w) - 1e-14


@given(seed=rng_seeds)
@settings(deadline=None, max_examples=40)
def test_between_the_seeds_the_gradient_vanishes(seed):
    """Σ w_k e_k, by finite differences too."""
    z = noise(6, 4, 8, 8, seed=seed)
    c = geometric_median(z).flatten()
    c, u = c / c.norm(), z.flatten(1) / z.flatten(1).norm(dim=1, keepdim=True)
    cosine = u @ c
    tangents = (u - cosine[:, None] * c) / (1 - cosine.square()).sqrt()[:, None]
    assert float(tangents.mean(dim=0).norm()) < 1e-10
    w = torch.full((6,), 1 / 6, dtype=torch.float64)
    for step in torch.cat([tangents, noise(4, 256, seed=seed + 1)]):
        step = step - step @ c * c
        step = (step / step.norm()).reshape(4, 8, 8)
        point, h = c.reshape(4, 8, 8), 1e-4
        ahead, behind = (cost(math.cos(x) * point + math.sin(x) * step, z, w) for x in (h, -h))
        assert (ahead - behind) / (2 * h) == pytest.approx(0, abs=1e-8)


@given(seed=rng_seeds)
@settings(deadline=None, max_examples=30)
def test_of_two_seeds_it_is_the_middle_when_they_weigh_the_same_and_else_the_heavier(seed):
    a, b = (z / z.norm() for z in noise(2, 4, 4, 4, seed=seed))
    z = torch.stack([a, b])
    torch.testing.assert_close(geometric_median(z), at(slerp(a, b, 0.5)), rtol=0, atol=1e-9)
    torch.testing.assert_close(geometric_median(z, row(0.4, 0.6)), at(b), rtol=0, atol=1e-9)
    torch.testing.assert_close(geometric_median(z, row(0.6, 0.4)), at(a), rtol=0, atol=1e-9)


def test_on_one_great_circle_it_is_the_median_of_the_angles():
    a, b = orthonormal(2)
    z = torch.stack([slerp(a, b, t) for t in (0.0, 0.3, 0.4, 0.7, 1.0)])
    torch.testing.assert_close(geometric_median(z), at(z[2]), rtol=0, atol=1e-9)
    tie = at(slerp(a, b, 0.5))  # all of the arc from 0.3 to 0.7 is as good
    for others in (z[[0, 1, 3, 4]], torch.stack([*z[[0, 1, 3]], slerp(a, b, 0.75)])):
        torch.testing.assert_close(geometric_median(others), tie, rtol=0, atol=1e-9)
    weightless = geometric_median(z[[1, 2, 3]], row(1, 0, 1))
    torch.testing.assert_close(weightless, tie, rtol=0, atol=1e-9)
    torch.testing.assert_close(geometric_median(z, row(5, 1, 1, 1, 1)), at(z[0]), rtol=0, atol=1e-9)


def test_orthogonal_seeds_hold_the_median_from_the_root_of_the_sum_of_squares_on():
    """At seed 1 the others pull at right angles: with √(w_2² + w_3²)."""
    z = orthonormal(3)
    torch.testing.assert_close(geometric_median(z, row(5, 3, 4)), at(z[0]), rtol=0, atol=1e-9)
    barely = row(5 + 1e-7, 3, 4)  # so little that the cost around tells nothing
    torch.testing.assert_close(geometric_median(z, barely), at(z[0]), rtol=0, atol=1e-12)
    shared = geometric_median(z[[0, 0, 1, 2]], row(2.5, 2.5 + 1e-7, 3, 4))
    torch.testing.assert_close(shared, at(z[0]), rtol=0, atol=1e-12)
    free = torch.rad2deg(angles(geometric_median(z, row(4.9, 3, 4)), z))
    assert 1 < float(free[0]) < float(free[1:].min())


def test_near_a_seed_it_is_still_found():
    z, w = orthonormal(3), row(5 - 1e-4, 3, 4)
    middle = geometric_median(z, w)
    c, u = (middle / middle.norm()).flatten(), z.flatten(1)
    cosine = u @ c
    tangents = (u - cosine[:, None] * c) / (u - cosine[:, None] * c).norm(dim=1, keepdim=True)
    assert float((w[:, None] / w.sum() * tangents).sum(dim=0).norm()) < 1e-10
    assert 1e-6 < float(angles(middle, z)[0]) < 1e-2


def test_repeated_seeds_act_as_their_sum():
    z = noise(3, 4, 4, 4)
    torch.testing.assert_close(geometric_median(z[[0, 0]]), at(z[0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(geometric_median(z[[0, 1, 1, 2]]), at(z[1]), rtol=0, atol=1e-7)
    z = noise(5, 4, 8, 8)
    repeated = geometric_median(z[[0, 1, 1, 2, 3, 4]])
    torch.testing.assert_close(repeated, geometric_median(z, row(1, 2, 1, 1, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [3, 5, 10, 25])
def test_for_random_seeds_it_is_nearly_the_normalised_mean(k):
    z = noise(8, k, 4, 64, 64, seed=k)
    apart = torch.rad2deg(angles(geometric_median(z), normalized(z)))
    assert float(apart.mean()) < 0.5
    assert float(apart.max()) < 1


def test_a_batch_may_mix_seeds_and_points_between():
    z = orthonormal(3).expand(3, 3, 4, 4, 4)
    middles = geometric_median(z, torch.stack([row(6, 3, 4), row(1, 1, 1), row(1, 1, 9)]))
    torch.testing.assert_close(middles[0], at(z[0, 0]), rtol=0, atol=1e-9)
    torch.testing.assert_close(middles[1], at(z[0].sum(dim=0)), rtol=0, atol=1e-9)
    torch.testing.assert_close(middles[2], at(z[0, 2]), rtol=0, atol=1e-9)


def test_seeds_around_the_whole_sphere_are_refused():
    z = noise(2, 4, 4, 4)
    with pytest.raises(ValueError, match="90° or more from its mean"):
        geometric_median(torch.stack([z[0], z[1], -z[0], -z[1]]))


def test_a_cone_so_wide_that_each_of_its_seeds_is_as_good_is_refused():
    """On a cone of 65° the axis is the median; at 85° going to a seed is better, and there are three."""
    torch.testing.assert_close(geometric_median(tilted(65)), at(tilted(65).sum(dim=0)), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="several medians"):
        geometric_median(tilted(85))
