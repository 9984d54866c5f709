"""Subspaces: bases, projections, coordinates, Gaussian seeds, and the grid of a slice."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.cog import cog
from stages.combine.subspace import Subspace, basis, grid, latents_at, project, weights_at
from stages.combine.whiten import whiten
from stages.contract import Chance

rng_seeds = st.integers(0, 10**6)
STREAM = (7, "combine", "rose", "rare")


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@given(seed=rng_seeds, k=st.integers(1, 7))
@settings(deadline=None)
def test_the_basis_is_gram_schmidts(seed, k):
    z = noise(k, 4, 4, 4, seed=seed)
    q, r = basis(z)
    flat = q.flatten(1)
    close(flat @ flat.mT, torch.eye(k, dtype=torch.float64))
    close(torch.einsum("jk,jchw->kchw", r, q), z)
    assert bool((r.diagonal() > 0).all())
    assert torch.equal(r, r.triu())
    close(q[0], z[0] / z[0].norm())


@given(seed=rng_seeds, k=st.integers(2, 7))
@settings(deadline=None)
def test_the_projection_is_the_nearest_point_of_the_span_and_its_weights_make_it(seed, k):
    z, x = noise(k, 4, 8, 8, seed=seed), noise(4, 8, 8, seed=seed + 1)
    s, w = project(x, z)
    close(torch.einsum("k,kchw->chw", w, z), s)  # A·A⁺s = s
    close(w, torch.linalg.pinv(z.flatten(1).mT) @ s.flatten())
    close(z.flatten(1) @ (x - s).flatten(), torch.zeros(k, dtype=torch.float64), 1e-11)
    again, _ = project(s, z)
    close(again, s)


def test_projections_of_noise_become_gaussian_seeds_by_cogs_transform():
    """And are none before: a projection on 5 of 16384 dimensions has norm √5."""
    z, x = noise(5, 4, 64, 64), noise(20, 4, 64, 64, seed=1)
    s, w = project(x, z)
    for point, seed in zip(s, cog(z, w), strict=True):
        assert scipy.stats.kstest(seed.flatten().numpy(), "norm").pvalue > 1e-4
        assert scipy.stats.kstest(point.flatten().numpy(), "norm").pvalue < 1e-9
        assert float(torch.cosine_similarity(seed.flatten(), point.flatten(), dim=0)) == pytest.approx(1)


@given(seed=rng_seeds, scale=st.floats(0.01, 100))
@settings(deadline=None)
def test_coordinates_are_a_direction_of_the_span_at_cogs_norm(seed, scale):
    z, h = noise(4, 4, 8, 8, seed=seed), noise(4, seed=seed + 1)
    q, _ = basis(z)
    point = torch.einsum("k,kchw->chw", h, q)
    close(torch.einsum("k,kchw->chw", weights_at(h, z), z), point)
    latent = latents_at(h, z)
    close(latent / latent.norm(), point / point.norm())
    close(latent, point / weights_at(h, z).norm(), 1e-10)
    close(latents_at(scale * h, z), latent, 1e-10)


def test_the_coordinates_of_a_seed_give_the_seed():
    z = noise(4, 4, 8, 8)
    _, r = basis(z)
    for k in range(4):
        close(latents_at(r[:, k], z), z[k], 1e-11)


def test_many_coordinates_of_one_group_and_a_batch_of_groups_are_loops():
    z, h = noise(2, 4, 4, 8, 8), noise(3, 4)
    for n in range(3):
        close(latents_at(h, z[0])[n], latents_at(h[n], z[0]), 1e-11)
        close(project(latents_at(h, z[0]), z[0])[1][n], project(latents_at(h[n], z[0]), z[0])[1], 1e-11)
    close(latents_at(h[:2], z)[1], latents_at(h[1], z[1]), 1e-11)
    close(basis(z)[0][1], basis(z[1])[0])


def test_candidates_are_uniform_over_the_directions_of_the_span():
    method = Subspace(Subspace.Config(group=3))
    draws = [method.draw(Chance(i, STREAM), 6) for i in range(1500)]
    assert len({draw.parents for draw in draws}) == 20  # 6 over 3
    h = torch.tensor([draw.weights for draw in draws])
    for column in h.T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    z_KCHW = noise(3, 4, 4, 4)
    q, _ = basis(z_KCHW)
    seeds = torch.stack([method(z_KCHW, draw.weights, {}) for draw in draws[:600]]).flatten(1)
    cosines = (seeds / seeds.norm(dim=1, keepdim=True)) @ q.flatten(1).mT
    close(cosines.square().sum(dim=1), torch.ones(600, dtype=torch.float64))
    for column in cosines.T:  # Archimedes: on the sphere of 3 dimensions each coordinate is uniform
        assert scipy.stats.kstest(column.numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3


def test_the_stages_weights_are_the_coordinates_and_whitening_fixes_the_norm():
    z_KCHW = noise(4, 4, 8, 8) + 0.5 * noise(4, 8, 8, seed=1)
    h = (0.3, -1.2, 0.8, 0.1)
    row = torch.tensor(h, dtype=torch.float64)
    plain, white = Subspace(Subspace.Config(group=4)), Subspace(Subspace.Config(group=4, whiten=True))
    assert torch.equal(plain(z_KCHW, h, {}), latents_at(row, z_KCHW))
    assert torch.equal(plain(z_KCHW.float(), h, {}), latents_at(row, z_KCHW.float().double()).float())
    close(white(z_KCHW, h, {}), latents_at(row, whiten(z_KCHW)))
    assert float(white(z_KCHW, h, {}).norm()) == pytest.approx(16)


@pytest.mark.parametrize("k", [3, 6])
def test_a_grid_is_a_chart_of_the_sphere_around_the_centroid(k):
    z = noise(k, 4, 8, 8)
    picture = grid(z, 5, 1.0)
    assert picture.shape == (5, 5, 4, 8, 8)
    middle = cog(z)
    close(picture[2, 2], middle, 1e-10)
    v = torch.linspace(-1, 1, 5, dtype=torch.float64)
    flat, centre = picture.flatten(2), middle.flatten() / middle.norm()
    cosine = flat @ centre / flat.norm(dim=-1)
    close(cosine, (1 + v[:, None] ** 2 + v[None, :] ** 2).rsqrt(), 1e-10)
    tangents = flat / (flat @ centre)[..., None] - centre  # gnomonic: an even grid of a plane
    close(tangents[1, 3], tangents[1, 2] + tangents[2, 3], 1e-10)
    assert float(tangents[2, 3] @ tangents[3, 2]) == pytest.approx(0, abs=1e-12)
    across = z[0].flatten() - z[0].flatten() @ centre * centre
    close(tangents[2, 3] / tangents[2, 3].norm(), across / across.norm(), 1e-10)  # towards the first seed
    assert float(tangents[3, 2] @ z[1].flatten()) > 0  # towards the second
    weights = project(picture, z)[1]
    close(torch.einsum("ijk,kchw->ijchw", weights, z), picture, 1e-10)  # in the span


def test_three_orthogonal_seeds_lie_in_their_picture():
    z = torch.eye(64, dtype=torch.float64)[:3].reshape(3, 4, 4, 4)
    picture = grid(z, 3, math.sqrt(2)).flatten(2)
    close(picture[1, 2], z[0].flatten(), 1e-12)
    q = torch.acos((grid(z, 201, 1.5).flatten(2) @ z.flatten(1).mT).clamp(max=1))
    assert float(q.amin(dim=(0, 1)).max()) < math.radians(1)


def test_the_axes_of_a_grid_can_be_chosen():
    z = noise(5, 4, 8, 8)
    _, r = basis(z)
    chosen = grid(z, 4, 1.2, r[:, [3, 1]].mT)
    reordered = grid(z[[3, 1, 0, 2, 4]], 4, 1.2)
    close(chosen, reordered, 1e-9)


def test_what_has_no_subspace_or_no_grid_is_refused():
    z = noise(3, 4, 4, 4)
    for dependent in (
        z[[0, 1, 0]],
        torch.stack([z[0], z[1], (z[0] + z[1]).float().double()]),
        noise(5, 1, 2, 2),
    ):
        with pytest.raises(ValueError, match="linearly dependent"):
            basis(dependent)
    with pytest.raises(ValueError, match="all zero"):
        latents_at(torch.zeros(3, dtype=torch.float64), z)
    with pytest.raises(ValueError, match="at least 2 points"):
        grid(z, 1, 1.0)
    with pytest.raises(ValueError, match="at least 3 seeds, given 2"):
        grid(z[:2], 4, 1.0)
    _, r = basis(z)
    with pytest.raises(ValueError, match="axes and the direction of the centroid"):
        grid(z, 4, 1.0, torch.stack([r.mean(dim=1), r[:, 0]]))
