"""The Karcher mean against what defines it: the smallest sum of squared angles."""

import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from stages.combine.karcher import karcher
from stages.combine.mean import normalized
from stages.combine.slerp import slerp

rng_seeds = st.integers(0, 10**6)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(k, seed):
    return torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + 0.05


def angles(c, z):
    c, z = c.flatten(-3), z.flatten(-3)
    c, z = c / c.norm(dim=-1, keepdim=True), z / z.norm(dim=-1, keepdim=True)
    return 2 * torch.atan2((z - c).norm(dim=-1), (z + c).norm(dim=-1))


def cost(c, z, w):
    return float((w * angles(c, z).square()).sum())


def test_three_orthonormal_seeds():
    middle = karcher(torch.eye(8, dtype=torch.float64)[:3].reshape(3, 2, 2, 2))
    torch.testing.assert_close(
        middle.flatten()[:3], torch.full((3,), (7 / 3) ** 0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert float(middle.flatten()[3:].abs().max()) == 0
    found = torch.rad2deg(angles(middle, torch.eye(8).double()[:3].reshape(3, 2, 2, 2)))
    assert found.tolist() == pytest.approx([54.7356103] * 3)


@given(seed=rng_seeds, k=st.integers(2, 7))
@settings(deadline=None, max_examples=40)
def test_the_cost_is_stationary_in_every_direction_and_no_point_around_is_better(seed, k):
    z, w = noise(k, 4, 4, 4, seed=seed), weights(k, seed)
    w = w / w.sum()
    middle = karcher(z, w)
    radius = float(middle.norm())
    assert radius == pytest.approx(63**0.5, rel=1e-12)
    inside = torch.einsum("nk,kchw->nchw", noise(8, k, seed=seed + 2), z)
    for step in torch.cat(
        [inside, noise(8, 4, 4, 4, seed=seed + 3)]
    ):  # in the span of the seeds, and out of it
        step = step - (step * middle).sum() / radius**2 * middle
        step = step / step.norm()
        h = 1e-4
        ahead, behind = (cost(math.cos(x) * middle + math.sin(x) * radius * step, z, w) for x in (h, -h))
        assert (ahead - behind) / (2 * h) == pytest.approx(0, abs=1e-8)
        for x in (1e-3, 0.1, 1.0):
            assert cost(math.cos(x) * middle + math.sin(x) * radius * step, z, w) > cost(middle, z, w)


@given(seed=rng_seeds)
@settings(deadline=None, max_examples=30)
def test_the_gradient_vanishes(seed):
    """Σ w_k log_c(z_k) by its formula."""
    z, w = noise(6, 4, 4, 4, seed=seed), weights(6, seed)
    w = w / w.sum()
    try:
        c = karcher(z, w).flatten()
    except ValueError:  # one of them is 90° or more from the others
        reject()
    c, u = c / c.norm(), z.flatten(1) / z.flatten(1).norm(dim=1, keepdim=True)
    cosine = u @ c
    logs = (u - cosine[:, None] * c) * (cosine.arccos() / (1 - cosine.square()).sqrt())[:, None]
    assert float((w[:, None] * logs).sum(dim=0).norm()) < 1e-10


@given(seed=rng_seeds, t=st.floats(0, 1))
@settings(deadline=None)
def test_two_seeds_meet_on_their_arc_at_the_ratio_of_the_weights(seed, t):
    a, b = (z / z.norm() for z in noise(2, 4, 4, 4, seed=seed))
    middle = karcher(torch.stack([a, b]), torch.tensor([1 - t, t], dtype=torch.float64))
    torch.testing.assert_close(middle / middle.norm(), slerp(a, b, t), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [3, 5, 10, 25])
def test_for_random_seeds_it_is_nearly_the_normalised_mean(k):
    """The difference comes from the seeds' norms and small cosines, and shrinks as 1/√d."""
    z = noise(8, k, 4, 64, 64, seed=k)
    apart = torch.rad2deg(angles(karcher(z), normalized(z)))
    assert float(apart.mean()) < 0.5
    assert float(apart.max()) < 1
    z = z / z.flatten(2).norm(dim=-1)[..., None, None, None]
    assert float(torch.rad2deg(angles(karcher(z), normalized(z))).max()) < 0.5


def test_norms_do_not_matter_and_repeated_seeds_act_as_their_sum():
    z = noise(3, 4, 4, 4)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    scaled = z * torch.tensor([1.0, 5.0, 0.1]).double()[:, None, None, None]
    torch.testing.assert_close(karcher(scaled, w), karcher(z, w), rtol=1e-10, atol=1e-10)
    repeated = karcher(z[[0, 1, 1, 2, 2, 2]])
    torch.testing.assert_close(repeated, karcher(z, w), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(karcher(z[[0, 0]]), z[0] * 63**0.5 / z[0].norm(), rtol=1e-10, atol=1e-10)
    assert torch.isfinite(karcher(noise(9, 1, 2, 3).abs())).all()  # more seeds than dimensions


def test_a_weight_of_zero_leaves_a_seed_out_even_an_opposite_one():
    z = noise(3, 4, 4, 4)
    w = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    z[2] = -z[0]
    torch.testing.assert_close(karcher(z, w), karcher(z[:2], w[:2]), rtol=1e-9, atol=1e-9)


def test_seeds_around_the_whole_sphere_are_refused():
    z = noise(2, 4, 4, 4)
    with pytest.raises(ValueError, match="90° or more from its mean"):
        karcher(torch.stack([z[0], z[1], -z[0], -z[1]]))
    with pytest.raises(ValueError, match="90° or more from its mean"):
        karcher(torch.stack([z[0], -z[0]]))
