"""What candidates draw: pairs, groups, places between; and that two methods draw the same."""

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError

from stages import registry
from stages.combine.draw import PairSettings, group, pair
from stages.combine.geometric_median import geometric_median
from stages.combine.karcher import karcher
from stages.combine.mean import euclidean, mode_norm, normalized, standardized
from stages.combine.whiten import whiten
from stages.contract import Chance

STREAM = (7, "combine", "rose", "rare")


def draws(method, n, seeds, stream=STREAM):
    return [method.draw(Chance(i, stream), seeds) for i in range(n)]


def make(name, **settings):
    cls = registry.resolve("combine", name)
    return cls(cls.Config(**settings))


def test_pairs_are_unordered_distinct_and_uniform_and_so_is_the_place():
    drawn = [pair(Chance(i, STREAM), 5, None, None) for i in range(2000)]
    pairs, counts = np.unique([d.parents for d in drawn], axis=0, return_counts=True)
    assert sorted(map(tuple, pairs)) == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert np.allclose([sum(d.weights) for d in drawn], 1)
    assert scipy.stats.kstest([d.weights[1] for d in drawn], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("points", [1, 3, 10])
def test_points_of_one_pair_stand_evenly_inside_it(points):
    drawn = [pair(Chance(i, STREAM), 6, None, points) for i in range(200 * points)]
    blocks = [drawn[i : i + points] for i in range(0, len(drawn), points)]
    for block in blocks:
        assert len({d.parents for d in block}) == 1
        assert [d.weights[1] for d in block] == pytest.approx([(j + 1) / (points + 1) for j in range(points)])
        assert all(sum(d.weights) == pytest.approx(1) for d in block)
    _, counts = np.unique([block[0].parents for block in blocks], axis=0, return_counts=True)
    assert len(counts) == 15
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_a_fixed_place_is_kept_while_the_pair_changes():
    drawn = [pair(Chance(i, STREAM), 5, 0.25, None) for i in range(50)]
    assert {d.weights for d in drawn} == {(0.75, 0.25)}
    assert len({d.parents for d in drawn}) > 5


def test_groups_are_distinct_seeds_and_every_group_comes():
    drawn = [group(Chance(i, STREAM), 5, 3, "equal") for i in range(1000)]
    groups, counts = np.unique([d.parents for d in drawn], axis=0, return_counts=True)
    assert len(groups) == 10  # 5 over 3
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert all(len(set(d.parents)) == 3 and d.weights == (1 / 3,) * 3 for d in drawn)


def test_dirichlet_weights_are_uniform_on_the_simplex():
    drawn = [group(Chance(i, STREAM), 3, 3, "dirichlet") for i in range(500)]
    assert {d.parents for d in drawn} == {(0, 1, 2)}
    weights = np.array([d.weights for d in drawn])
    assert np.allclose(weights.sum(axis=1), 1)
    for column in weights.T:  # each weight of a uniform draw from the simplex is Beta(1, K − 1)
        assert scipy.stats.kstest(column, "beta", args=(1, 2)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("lerp", "slerp", "slerp_rescaled", "cog"), {}),
        (("lerp", "slerp", "slerp_rescaled", "cog"), {"points": 3}),
        (
            ("euclidean", "normalized", "mode_norm", "standardized", "karcher", "geometric_median"),
            {"group": 4},
        ),
        (("euclidean", "karcher"), {"weights": "dirichlet"}),
    ],
)
def test_methods_of_a_kind_draw_alike_in_one_stream_and_differently_in_another(names, settings):
    first, *others = (draws(make(name, **settings), 40, 9) for name in names)
    assert all(other == first for other in others)
    assert draws(make(names[0], **settings), 40, 9, (8, *STREAM[1:])) != first
    assert draws(make(names[0], **settings), 40, 9, (*STREAM[:3], "plain")) != first


def test_centroids_of_cog_are_those_of_the_other_methods():
    assert draws(make("cog", mode="centroid", group=4), 40, 9) == draws(make("karcher", group=4), 40, 9)


@pytest.mark.parametrize(
    "name", ["lerp", "slerp", "slerp_rescaled", "geodesic", "cog", "subspace", "karcher", "standardized"]
)
def test_a_candidate_depends_on_no_other(name):
    """Any order, any part of the stream: a worker may begin anywhere."""
    settings = {"points": 4} if "points" in registry.resolve("combine", name).Config.model_fields else {}
    in_order = draws(make(name, **settings), 30, 7)
    method = make(name, **settings)
    for i in (29, 3, 17, 0, 3):
        assert method.draw(Chance(i, STREAM), 7) == in_order[i]


@pytest.mark.parametrize(
    ("name", "settings", "needed"),
    [("lerp", {}, 2), ("geodesic", {}, 2), ("karcher", {"group": 10}, 10), ("subspace", {"group": 4}, 4)],
)
def test_the_fewest_seeds_are_enough(name, settings, needed):
    method = make(name, **settings)
    assert method.seeds_needed() == needed
    assert all(d.parents == tuple(range(needed)) for d in draws(method, 5, needed))


@pytest.mark.parametrize(
    "middle", [euclidean, normalized, mode_norm, standardized, karcher, geometric_median]
)
def test_a_centroid_of_the_stage_uses_its_weights_and_whitens_when_asked(middle):
    z_KCHW = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = (0.5, 0.3, 0.2)
    w_K = torch.tensor(weights, dtype=torch.float64)
    assert torch.equal(make(middle.__name__)(z_KCHW, weights, {}), middle(z_KCHW, w_K))
    whitened = make(middle.__name__, whiten=True)(z_KCHW, weights, {})
    assert torch.equal(whitened, middle(whiten(z_KCHW), w_K))


def test_settings_that_contradict_or_leave_their_range_are_refused():
    with pytest.raises(ValidationError, match=r"t = 0.5 and points = 3 both say where .* set one"):
        PairSettings(t=0.5, points=3)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        make("slerp", t=1.5)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        make("lerp", points=0)
    with pytest.raises(ValidationError, match="'own' or 'angle'"):
        make("lerp", pace="fast")
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        make("karcher", group=1)
    with pytest.raises(ValidationError, match="'equal' or 'dirichlet'"):
        make("euclidean", weights="random")
