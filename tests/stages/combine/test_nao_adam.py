"""The published optimiser of NAO: its objective, its rules, and how far from noise its results are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from stages.combine import nao_adam
from stages.combine.nao import distance, line_cost, nao_centroid, nao_path
from stages.combine.nao_adam import NaoAdam, adam_centroid, adam_path, discrete_cost, minus_log_chi
from stages.contract import Chance

STREAM = (7, "bird", "rare")


def seeds(count, shape=(4, 64, 64), rng_seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(rng_seed))


def off_span(z, of):
    """The largest share of energy outside the span of the seeds."""
    basis = torch.linalg.qr(of.double().flatten(1).T).Q
    x = z.double().reshape(-1, len(basis))
    return float((1 - (x @ basis).square().sum(dim=1) / x.square().sum(dim=1)).max())


def kurtosis(z):
    """The lowest excess kurtosis of the latents."""
    return stats.kurtosis(z.double().reshape(-1, 16384).numpy(), axis=1).min()


@pytest.fixture
def steps(monkeypatch):
    """A function that limits the optimiser, for what does not depend on its end."""
    return lambda count: monkeypatch.setattr(nao_adam, "STEPS", count)


def test_the_objective_is_the_papers():
    x = seeds(3, (4, 2, 2)).double().flatten(1).numpy()
    length = np.linalg.norm(np.diff(x, axis=0), axis=1)
    middle = np.linalg.norm((x[1:] + x[:-1]) / 2, axis=1)
    line = (-stats.chi.logpdf(middle, 16) * length).sum()
    z = torch.from_numpy(x).reshape(3, 4, 2, 2)
    assert float(discrete_cost(z)) == pytest.approx(line, rel=1e-12)
    penalty = np.maximum(length - length.mean(), 0).sum()
    assert float(discrete_cost(z, length.mean())) == pytest.approx(line + penalty, rel=1e-12)
    assert discrete_cost(z.expand(2, -1, -1, -1, -1)).shape == (2,)


def test_in_float32_the_weight_comes_in_coarse_steps():
    """The stop rule asks for changes of 0.001 in a sum of 10 such values, each times a length of 20."""
    r = torch.linspace(127, 129, 1000)
    values = minus_log_chi(r, 16384)
    assert torch.equal(values * 2**7, (values * 2**7).round())
    assert float((values - minus_log_chi(r.double(), 16384)).abs().max()) > 2**-8


def test_paths_of_few_points_leave_the_seeds_span_and_are_not_gaussian():
    z = seeds(2)
    path, exact = adam_path(z[0], z[1], 5), nao_path(z[0], z[1], 5)
    assert torch.equal(path[[0, -1]], z)
    assert off_span(path, z) > 0.01
    assert kurtosis(path) < -0.7
    assert off_span(exact, z) < 1e-12
    assert abs(kurtosis(exact)) < 5 * math.sqrt(24 / 16384)
    # it does minimise the discrete objective, but the line integral is another thing
    assert 0.9 * float(distance(z[0], z[1])) < float(discrete_cost(path.double())) < 140
    assert float(line_cost(path)) > float(distance(z[0], z[1]))


def test_centroids_leave_it_further():
    z = seeds(3)
    c, paths = adam_centroid(z, 4)
    assert paths.shape == (3, 4, 4, 64, 64)
    assert torch.equal(paths[:, 0], z)
    assert torch.equal(paths[:, -1], c.expand_as(z))
    assert off_span(c, z) > 0.03
    assert kurtosis(c) < -1
    assert float(line_cost(paths).sum()) > float(distance(nao_centroid(z).expand_as(z), z).sum())


def test_the_start_is_the_chord_and_noise_of_the_seeds_own(steps):
    steps(0)
    z = seeds(2, (4, 4, 4))
    start = adam_path(z[0], z[1], 6)
    noise = start - torch.lerp(z[0], z[1], torch.linspace(0, 1, 6)[:, None, None, None])
    assert float(noise[1:-1].min()) > -1e-6
    assert float(noise[1:-1].max()) < 0.01 + 1e-6
    assert stats.kstest(100 * noise[1:-1].flatten().numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(start, adam_path(z[0], z[1], 6))
    other = seeds(2, (4, 4, 4), 1)
    chord = torch.lerp(other[0], other[1], torch.linspace(0, 1, 6)[:, None, None, None])
    assert not torch.allclose(adam_path(other[0], other[1], 6) - chord, noise, atol=1e-3)


def test_centroids_start_at_the_mean_or_half_way(steps):
    steps(0)
    z = seeds(3, (4, 4, 4))
    assert torch.equal(adam_centroid(z, 3)[0], z.mean(dim=0))
    half_way = adam_centroid(z, 3, "slerp")[0]
    assert float(half_way.norm()) == pytest.approx(float(z[:2].flatten(1).norm(dim=1).mean()), rel=0.05)
    assert off_span(half_way, z[:2]) < 1e-6


@pytest.mark.parametrize(("change", "times"), [nao_adam.PATH_STOP, nao_adam.CENTROID_STOP])
def test_it_stops_when_the_loss_stands_still(change, times):
    """The first changes are large, one in the middle interrupts the row, the rest is below the limit."""
    x = torch.zeros(1, requires_grad=True)
    values = [9.0, 8.0, *[8.0] * (times - 1), 8 + 2 * change, *[8 + 2.5 * change] * 100]
    seen = []

    def loss():
        seen.append(values[len(seen)])
        return x.sum() * 0 + seen[-1]

    nao_adam._minimise([x], loss, change, times)
    assert len(seen) == 2 + (times - 1) + 1 + times


def test_first_steps_are_a_hundredth_of_a_sign(steps):
    """Why the seeds' span is left: each coordinate goes as far, however small its share of the gradient."""
    z = seeds(2, (4, 4, 4))
    steps(0)
    start = adam_path(z[0], z[1], 3)[1]
    steps(1)
    step = adam_path(z[0], z[1], 3)[1] - start
    assert step.abs().numpy() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(step.sign(), start.sign())


def test_what_cannot_be_a_path_is_refused():
    z = seeds(2, (4, 4, 4))
    with pytest.raises(ValueError, match="at least 3, given 2"):
        adam_path(z[0], z[1], 2)
    with pytest.raises(ValueError, match="2 seeds and paths of 3 points, given 1"):
        adam_centroid(z[:1], 3)


@pytest.mark.parametrize(("points", "places"), [(None, [1, 2, 3, 4, 5, 6, 7]), (3, [2, 4, 6]), (1, [4])])
def test_the_candidates_of_a_pair_are_points_of_one_path(steps, points, places):
    steps(20)
    z, count = seeds(2, (4, 4, 4)), len(places)
    method = NaoAdam(NaoAdam.Config(path=9, points=points))
    drawn = [method.draw(Chance(i, STREAM), 6) for i in range(2 * count)]
    assert [len({d.parents for d in part}) for part in (drawn[:count], drawn[count:])] == [1, 1]
    path = adam_path(z[0], z[1], 9)
    for i in reversed(range(count)):
        assert torch.equal(method(z, drawn[i].weights, {}), path[places[i]])
        assert torch.equal(method(z.flip(0), drawn[i].weights, {}), adam_path(z[1], z[0], 9)[places[i]])


def test_points_must_be_points_of_the_path():
    with pytest.raises(ValidationError, match=r"points = 3 are no points of .* path of 12: .* path: 13"):
        NaoAdam.Config(points=3)
    NaoAdam.Config(points=3, path=13)
    with pytest.raises(ValidationError, match=r"group = 5 does nothing in mode path; .* mode: centroid"):
        NaoAdam.Config(group=5)


@pytest.mark.parametrize("start", ["mean", "slerp"])
def test_a_centroid_of_a_group(steps, start):
    steps(20)
    z = seeds(3, (4, 4, 4)).half()
    method = NaoAdam(NaoAdam.Config(mode="centroid", path=4, start=start))
    drawn = method.draw(Chance(0, STREAM), 5)
    assert (len(drawn.parents), method.seeds_needed()) == (3, 3)
    made = method(z, drawn.weights, {})
    assert made.dtype == torch.float16
    assert torch.equal(made, adam_centroid(z, 4, start)[0])
