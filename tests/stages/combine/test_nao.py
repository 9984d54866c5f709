"""NAO: paths between seeds, metric, costs, centroid, stage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize

from stages.combine.clairaut import plane_cost
from stages.combine.geometric_median import geometric_median
from stages.combine.nao import (
    Nao,
    curve_cost,
    distance,
    line_cost,
    nao,
    nao_centroid,
    nao_centroid_paths,
    nao_path,
)
from stages.combine.radial import radial
from stages.combine.slerp import slerp
from stages.combine.whiten import whiten
from stages.contract import Chance
from tests.typical_seeds import SHAPES, at_angle, seeds

# --- paths between seeds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "depths", "theta"),
    [
        (64, (0.5, -0.4), 1.6),
        (64, (0.5, 0.4), 0.3),
        (64, (3.0, 2.5), 0.5),
        (1024, (0.5, -0.4), 1.6),
        (1024, (-0.5, -0.4), 0.01),
        (1024, (7.0, 9.0), 0.1),
        (1024, (-7.0, -9.0), 0.1),
    ],
)
def test_the_points_lie_on_a_curve_of_that_cost(d, depths, theta):
    a, b = at_angle(d, *(math.sqrt(d - 1) + depth for depth in depths), theta)
    coarse, fine = (float(line_cost(nao_path(a, b, n + 1))) for n in (1500, 3000))
    assert (4 * fine - coarse) / 3 == pytest.approx(float(distance(a, b)), rel=1e-6)


def test_cheaper_than_slerp_and_slerp_cheaper_than_lerp():
    for part in range(10):
        z0, z1 = seeds(200, 1024, part).chunk(2)
        exact = distance(z0, z1)
        on_slerp = curve_cost(lambda t, a=z0, b=z1: slerp(a, b, t))
        on_lerp = line_cost(torch.stack([z0, z1], dim=1))
        assert bool((exact < on_slerp).all())
        assert bool((on_slerp < on_lerp).all())


def test_points_are_typical_noise_in_the_plane_of_the_seeds():
    d = 16384
    z = seeds(20, d)
    path = nao_path(z[:10], z[10:], 11)
    values = path.flatten(-3).numpy()
    assert np.abs(stats.kurtosis(values, axis=-1)).max() <= 5 * math.sqrt(24 / d)
    assert np.linalg.norm(values[:, 1:-1], axis=-1) == pytest.approx(radial(d).best, abs=1e-9)
    for a, b, points in zip(z[:10], z[10:], path, strict=True):
        plane = torch.linalg.qr(torch.stack([a, b]).flatten(1).T).Q
        x = points.flatten(1)
        assert float((x - x @ plane @ plane.T).norm()) < 1e-10
        steps = torch.nn.functional.cosine_similarity(x[1:], x[:-1]).arccos()
        assert steps.numpy() == pytest.approx(float(steps.mean()), rel=1e-6)  # equal angles


@given(rng_seed=st.integers(0, 10**6), t=st.floats(0, 1), scale=st.floats(0.5, 2))
@settings(deadline=None, max_examples=15)
def test_ends_and_symmetry(rng_seed, t, scale):
    a, b = seeds(2, 64, rng_seed)
    b = scale * b
    torch.testing.assert_close(nao(a, b, 0.0), a)
    torch.testing.assert_close(nao(a, b, 1.0), b)
    torch.testing.assert_close(nao(a, b, t), nao(b, a, 1 - t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [64, 1024])
def test_a_batch_is_a_loop(d):
    z0, z1 = seeds(12, d).reshape(2, 2, 3, *SHAPES[d])
    z1[0, 0] = z0[0, 0] + 1e-3 * z1[0, 0]  # one that is near, among others that may not be
    t = torch.linspace(0.1, 0.9, 6).reshape(2, 3)
    many, apart = nao(z0, z1, t), distance(z0, z1)
    assert (many.shape, apart.shape) == (z0.shape, (2, 3))
    for i in np.ndindex(2, 3):
        torch.testing.assert_close(many[i], nao(z0[i], z1[i], float(t[i])), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(apart[i], distance(z0[i], z1[i]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nao_path(z0, z1, 3)[..., 1, :, :, :], nao(z0, z1, 0.5), rtol=1e-12, atol=1e-12)


def test_computed_in_double_and_returned_as_given():
    z = seeds(3, 1024).float()
    assert torch.equal(nao(z[0], z[1], 0.01), nao(z[0].double(), z[1].double(), 0.01).float())
    assert torch.equal(nao_centroid(z), nao_centroid(z.double()).float())
    assert nao_path(z[0], z[1], 5).dtype == nao_centroid_paths(z, 5).dtype == torch.float32
    assert torch.equal(nao_path(z[0], z[1], 5)[[0, -1]], z[:2])
    assert distance(z[0], z[1]).dtype == torch.float64


# --- the distance ------------------------------------------------------------------------------------------


triples = st.tuples(st.integers(0, 10**6), *[st.floats(0.5, 2)] * 3, st.sampled_from([1.0, 0.1, 1e-3]))


@given(triples)
@settings(deadline=None, max_examples=30)
def test_a_metric(drawn):
    """Also of seeds that are near each other (the last number) and have untypical norms."""
    rng_seed, *scales, spread = drawn
    first, *others = seeds(3, 64, rng_seed)
    x, y, z = (
        scale * v for scale, v in zip(scales, [first, *(first + spread * o for o in others)], strict=True)
    )
    xy, yz, xz = float(distance(x, y)), float(distance(y, z)), float(distance(x, z))
    assert min(xy, yz, xz) > 0
    assert float(distance(y, x)) == pytest.approx(xy, rel=1e-12)
    assert float(distance(x, x)) == 0
    assert xz <= (xy + yz) * (1 + 1e-10)
    assert xy <= (xz + yz) * (1 + 1e-10)


@pytest.mark.parametrize("d", [64, 1024])
def test_a_point_of_the_path_divides_the_distance(d):
    a, b = seeds(2, d)
    for t in (0.003, 0.1, 0.5):
        z = nao(a, b, t)
        assert float(distance(a, z) + distance(z, b)) == pytest.approx(float(distance(a, b)), rel=1e-9)


def test_identical_seeds():
    a = seeds(1)[0]
    assert float(distance(a, a)) == 0
    torch.testing.assert_close(nao_path(a, a, 4), a.expand(4, -1, -1, -1))


@pytest.mark.parametrize("ratio", [1 + 1e-9, 1.2, 0.6])
def test_parallel_seeds_are_joined_along_the_radius(ratio):
    a = seeds(1)[0]
    g, r = radial(64), float(a.norm())
    expected = abs(quad(lambda s: float(g.weight(s)), r, ratio * r, epsrel=1e-12)[0])
    assert float(distance(a, ratio * a)) == pytest.approx(expected, rel=1e-6)
    path = nao_path(a, ratio * a, 9)
    assert float(line_cost(path)) == pytest.approx(expected, rel=1e-6)
    b = seeds(2)[1]
    torch.testing.assert_close(
        path, nao_path(a, ratio * (a + 1e-7 * b), 9), rtol=1e-4, atol=1e-4
    )  # the limit


@pytest.mark.parametrize("d", [64, 1024])
@pytest.mark.parametrize("apart", [1e-12, 1e-8, 1e-4, 1e-2])
def test_nearly_parallel_seeds(d, apart):
    a, b = seeds(2, d)
    near = a + apart * b
    f = float(distance(a, near))
    here = float(radial(d).weight(float(a.norm())))
    # two relative errors: of a difference of two seeds in float64, and of w between them
    assert f == pytest.approx(here * apart * float(b.norm()), rel=1e-3 / apart * 1e-12 + 20 * apart)
    path = nao_path(a, near, 5)
    assert float(line_cost(path)) == pytest.approx(f, rel=1e-3 / apart * 1e-12 + 20 * apart)


def test_opposite_seeds_have_a_distance_but_no_one_path():
    a, b = seeds(2, 1024)
    g = radial(1024)
    r = np.array([float(a.norm()), 1.1 * float(a.norm())])
    expected = math.pi * g.m + g.layer(g.depth(r))[0].sum()
    assert float(distance(a, -1.1 * a)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="opposite"):
        nao(a, -1.1 * a, 0.5)
    almost = nao_path(a, 1e-2 * b - a, 9)
    assert float(almost[4].norm()) == pytest.approx(g.best, abs=1e-6)
    assert float(distance(a, almost[4])) == pytest.approx(float(distance(almost[4], 1e-2 * b - a)), rel=1e-3)


def test_what_is_no_pair_of_seeds_is_refused():
    a, b = seeds(2)
    with pytest.raises(ValueError, match=r"norms in 64 dimensions are near 7.937.*rescale"):
        nao(a, 0 * b, 0.5)
    with pytest.raises(ValueError, match="rescale"):
        distance(a, 20 * b)
    with pytest.raises(ValueError, match="rescale"):
        nao(a, torch.full_like(b, float("nan")), 0.5)
    with pytest.raises(ValueError, match="at least its two ends"):
        nao_path(a, b, 1)
    with pytest.raises(ValueError, match="at least 4"):
        nao(a[:3, :1, :1], b[:3, :1, :1], 0.5)


# --- costs along given curves ------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 16384])
def test_the_cost_along_lines_is_the_integral(d):
    a, b, c = seeds(3, d)
    w = radial(d).weight

    def integral(a, b):
        def rate(t):
            return float(w(float(torch.lerp(a, b, t).norm()))) * float((b - a).norm())

        return quad(rate, 0, 1, epsabs=0, epsrel=1e-10)[0]

    assert float(line_cost(torch.stack([a, b, b, c]))) == pytest.approx(
        integral(a, b) + integral(b, c), rel=1e-9
    )
    assert float(curve_cost(lambda t: torch.lerp(a, b, t), 4)) == pytest.approx(integral(a, b), rel=1e-9)
    # through the origin, where w has no value; −log χ is integrable there
    through = float(line_cost(torch.stack([a, -a])))
    assert through == pytest.approx(
        2 * quad(lambda s: float(w(s)), 0, float(a.norm()), epsrel=1e-10)[0], rel=1e-7
    )


def test_the_cost_of_slerp_is_the_limit_of_its_polylines():
    a, b = seeds(2, 1024)
    fine = [float(line_cost(torch.stack([slerp(a, b, i / n) for i in range(n + 1)]))) for n in (1000, 2000)]
    assert float(curve_cost(lambda t: slerp(a, b, t))) == pytest.approx((4 * fine[1] - fine[0]) / 3, rel=1e-8)


# --- centroids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, 10])
def test_no_better_centroid_is_found_in_the_span(k):
    d = 16384
    z = seeds(k, d, rng_seed=k)
    basis, triangle = (m.numpy() for m in torch.linalg.qr(z.flatten(1).T))
    points = triangle.T  # the seeds in coordinates of their span

    def totals(centres):
        r = np.stack(
            np.broadcast_arrays(np.linalg.norm(centres, axis=1)[:, None], np.linalg.norm(points, axis=1))
        )
        cosine = centres @ points.T / r.prod(axis=0)
        return (
            plane_cost(d, r.reshape(2, -1).T, np.arccos(np.clip(cosine, -1, 1)).ravel()).reshape(-1, k).sum(1)
        )

    def total(x):
        """Of a norm in units of √d and a direction, and its gradient by differences."""
        x = x + 1e-6 * np.concatenate([np.zeros((1, k + 1)), np.eye(k + 1), -np.eye(k + 1)])
        values = totals(x[:, :1] * math.sqrt(d) * x[:, 1:] / np.linalg.norm(x[:, 1:], axis=1, keepdims=True))
        return values[0], (values[1 : k + 2] - values[k + 2 :]) / 2e-6

    c = nao_centroid(z)
    best = float(distance(c.expand_as(z), z).sum())
    assert totals((basis.T @ c.flatten().numpy())[None])[0] == pytest.approx(best, rel=1e-10)
    rng = np.random.default_rng(k)
    found = []
    for _ in range(20):
        start = np.append(rng.uniform(0.5, 1.5), rng.normal(size=k))
        limits = [(0.4, 3), *[(None, None)] * k]
        found.append(minimize(total, start, method="L-BFGS-B", jac=True, bounds=limits).fun)
    assert min(found) >= best * (1 - 1e-9)
    assert min(found) == pytest.approx(best, rel=1e-6)


def test_leaving_the_span_or_the_norm_costs():
    z = seeds(4, 1024)
    c = nao_centroid(z)
    best = distance(c.expand_as(z), z).sum()
    assert float(c.norm()) == pytest.approx(radial(1024).best, rel=1e-12)
    for step in 0.3 * seeds(20, 1024, 1):
        turned = (c + step) * (c.norm() / (c + step).norm())
        assert distance(turned.expand_as(z), z).sum() > best
    for factor in (0.99, 1.01):
        assert distance((factor * c).expand_as(z), z).sum() > best


def test_centroids_of_a_batch_with_weights():
    z = seeds(6, 64).reshape(2, 3, *SHAPES[64])
    w = torch.tensor([[0.2, 0.3, 0.5], [1.0, 1.0, 1.0]])
    c = nao_centroid(z, w)
    for i in range(2):
        torch.testing.assert_close(c[i], nao_centroid(z[i], w[i]))
        direction = geometric_median(z[i], w[i])
        torch.testing.assert_close(c[i] / c[i].norm(), direction / direction.norm())
    torch.testing.assert_close(c[1], nao_centroid(z[1]))


def test_paths_from_the_seeds_to_the_centroid():
    z = seeds(6, 64).reshape(2, 3, *SHAPES[64])
    paths, c = nao_centroid_paths(z, 5), nao_centroid(z)
    assert paths.shape == (2, 3, 5, *SHAPES[64])
    torch.testing.assert_close(paths[:, :, 0], z)
    torch.testing.assert_close(paths[:, :, -1], c[:, None].expand_as(z))
    torch.testing.assert_close(paths[1, 2], nao_path(z[1, 2], c[1], 5))


# --- the stage ---------------------------------------------------------------------------------------------


STREAM = (7, "bird", "rare")


def draws(method, count, seeds):
    return [method.draw(Chance(i, STREAM), seeds) for i in range(count)]


def test_a_path_of_ten_points():
    z = seeds(2).float()
    method = Nao(Nao.Config(points=10))
    drawn = draws(method, 20, 5)
    assert len({d.parents for d in drawn[:10]}) == 1
    made = torch.stack([method(z, d.weights, {}) for d in drawn[:10]])
    torch.testing.assert_close(made, nao_path(z[0], z[1], 12)[1:-1])
    assert method.seeds_needed() == 2


def test_a_centroid_of_a_group():
    z = seeds(4).float()
    method = Nao(Nao.Config(mode="centroid", group=4, weights="dirichlet"))
    drawn = method.draw(Chance(3, STREAM), 9)
    w = torch.tensor(drawn.weights, dtype=torch.float64)
    torch.testing.assert_close(method(z, drawn.weights, {}), nao_centroid(z, w))
    assert method.seeds_needed() == 4


def test_points_on_all_paths_to_a_centroid():
    z = seeds(3).float()
    method = Nao(Nao.Config(mode="centroid_paths", group=3, points=4))
    drawn = draws(method, 24, 8)
    assert [len({d.parents for d in part}) for part in (drawn[:12], drawn[12:])] == [1, 1]
    made = torch.stack([method(z, d.weights, {}) for d in drawn[:12]])
    torch.testing.assert_close(made.reshape(3, 4, *z.shape[1:]), nao_centroid_paths(z, 6)[:, 1:-1])
    # its groups are those that mode centroid draws
    assert drawn[12].parents == Nao(Nao.Config(mode="centroid")).draw(Chance(1, STREAM), 8).parents


def test_a_random_path_to_a_centroid():
    method = Nao(Nao.Config(mode="centroid_paths", group=3))
    drawn = draws(method, 600, 5)
    weights = np.array([d.weights for d in drawn])
    assert weights.sum(axis=1) == pytest.approx(1)
    j, t = weights.argmax(axis=1), 3 * weights.min(axis=1)
    assert stats.kstest(t, "uniform").pvalue > 1e-4
    assert stats.chisquare(np.bincount(j)).pvalue > 1e-4
    assert abs(stats.spearmanr(j, t).statistic) < 0.17
    z = seeds(3)
    torch.testing.assert_close(
        method(z, drawn[0].weights, {}), nao(z[j[0]], nao_centroid(z), float(t[0])), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_of_a_path_to_a_centroid(t):
    z = seeds(3)
    method = Nao(Nao.Config(mode="centroid_paths", group=3, t=t))
    drawn = method.draw(Chance(0, STREAM), 3)
    expected = nao_centroid(z) if t else z[drawn.weights.index(1.0)]
    torch.testing.assert_close(method(z, drawn.weights, {}), expected)


@pytest.mark.parametrize("mode", ["path", "centroid", "centroid_paths"])
def test_whitened_seeds(mode):
    z = seeds(3) + 0.5 * seeds(1, rng_seed=9)
    z = z[:2] if mode == "path" else z
    config = {"mode": mode} if mode == "path" else {"mode": mode, "group": len(z)}
    weights = Nao(Nao.Config(**config)).draw(Chance(0, STREAM), len(z)).weights
    whitened = Nao(Nao.Config(**config, whiten=True))(z, weights, {})
    torch.testing.assert_close(whitened, Nao(Nao.Config(**config))(whiten(z), weights, {}))


def test_settings_that_contradict_each_other():
    with pytest.raises(ValidationError, match=r"weights = dirichlet does nothing .* mode: centroid "):
        Nao.Config(mode="centroid_paths", weights="dirichlet")
    with pytest.raises(ValidationError, match=r"points = 3 does nothing .* mode: path or centroid_paths "):
        Nao.Config(mode="centroid", points=3)
    with pytest.raises(ValidationError, match=r"group = 5 does nothing .* mode: centroid or centroid_paths "):
        Nao.Config(group=5)
    with pytest.raises(ValidationError, match="set one of them"):
        Nao.Config(t=0.5, points=3)
