"""What every combination owes, whatever its mathematics: batches, symmetries, dtypes, errors for shapes."""

import contextlib
import functools

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.combine.cog import cog
from stages.combine.geodesic import geodesic
from stages.combine.geometric_median import geometric_median
from stages.combine.karcher import karcher
from stages.combine.latents import to_norm
from stages.combine.lerp import chord_fraction, lerp
from stages.combine.mean import euclidean, mode_norm, normalized, standardized
from stages.combine.slerp import slerp
from stages.combine.slerp_rescaled import slerp_rescaled
from stages.combine.subspace import latents_at, weights_at
from stages.combine.whiten import whiten

PAIRS = [lerp, slerp, slerp_rescaled, geodesic]
CENTROIDS = [euclidean, normalized, mode_norm, standardized, karcher, geometric_median]
GROUPS = [*CENTROIDS, cog]

rng_seeds = st.integers(0, 10**6)
exact = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)) + 0.1


@contextlib.contextmanager
def unchecked():
    """As in a user's process, where nobody checks annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("method", PAIRS)
def test_a_batch_of_pairs_is_a_loop(method):
    a, b, t = noise(2, 3, 4, 5, 6), noise(2, 3, 4, 5, 6, seed=1), weights(2, 3) / 1.1
    together = method(a, b, t)
    for i in range(2):
        for j in range(3):
            exact(together[i, j], method(a[i, j], b[i, j], float(t[i, j])))
    exact(method(a, b, 0.3)[1, 2], method(a[1, 2], b[1, 2], torch.tensor(0.3, dtype=torch.float64)))


@pytest.mark.parametrize("method", GROUPS)
def test_a_batch_of_groups_is_a_loop(method):
    z, w = noise(2, 3, 5, 4, 4, 4), weights(2, 3, 5)
    together, equal = method(z, w), method(z)
    for i in range(2):
        for j in range(3):
            exact(together[i, j], method(z[i, j], w[i, j]))
            exact(equal[i, j], method(z[i, j], torch.full((5,), 0.2, dtype=torch.float64)))


@pytest.mark.parametrize("method", PAIRS)
@given(seed=rng_seeds, t=st.floats(0, 1))
@settings(deadline=None)
def test_from_the_other_end_it_is_the_same_way(method, seed, t):
    a, b = noise(2, 2, 3, 3, seed=seed)
    exact(method(a, b, t), method(b, a, 1 - t))


@pytest.mark.parametrize("method", GROUPS)
@given(seed=rng_seeds, order=st.permutations(range(4)))
@settings(deadline=None)
def test_the_order_of_a_group_does_not_matter(method, seed, order):
    z, w = noise(4, 4, 8, 8, seed=seed), weights(4, seed=seed)
    exact(method(z[list(order)], w[list(order)]), method(z, w))


@pytest.mark.parametrize("method", [*PAIRS, *(m for m in GROUPS if m is not standardized)])
@given(seed=rng_seeds)
@settings(deadline=None, max_examples=30)
def test_all_but_standardizing_turn_with_the_seeds(method, seed):
    """The elements of a latent have no meaning for them, only norms and angles have."""
    z = noise(3, 4, 4, 4, seed=seed)
    rotation, _ = torch.linalg.qr(noise(64, 64, seed=seed + 1))

    def turn(latents):
        return (latents.flatten(-3) @ rotation.mT).unflatten(-1, (4, 4, 4))

    arguments, turned = (
        ((z[0], z[1], 0.3), (turn(z[0]), turn(z[1]), 0.3)) if method in PAIRS else ((z,), (turn(z),))
    )
    exact(method(*turned), turn(method(*arguments)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", GROUPS)
@given(seed=rng_seeds, scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_weights_act_by_their_proportions(method, seed, scale):
    z, w = noise(3, 4, 8, 8, seed=seed), weights(3, seed=seed)
    exact(method(z, scale * w), method(z, w))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", [*PAIRS, *GROUPS, whiten])
def test_computed_in_double_and_returned_as_given(method, dtype):
    z = noise(3, 4, 8, 8).to(dtype)
    arguments = ((z[0], z[1]), (0.3,)) if method in PAIRS else ((z,), ())
    result = method(*arguments[0], *arguments[1])
    assert result.dtype == dtype
    assert torch.equal(result, method(*(x.double() for x in arguments[0]), *arguments[1]).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*PAIRS, *GROUPS, whiten])
def test_computed_where_the_seeds_are(method):
    z = noise(3, 4, 8, 8).cuda()
    arguments = (z[0], z[1], 0.3) if method in PAIRS else (z,)
    result = method(*arguments)
    assert result.device == z.device
    on_cpu = method(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments))
    torch.testing.assert_close(result.cpu(), on_cpu, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [*PAIRS, chord_fraction])
def test_pairs_of_wrong_shape_are_refused(method):
    a, b = noise(2, 2, 4, 3, 3)
    with unchecked():
        with pytest.raises(ValueError, match=r"one shape .* given \(2, 4, 3, 3\) and \(4, 3, 3\)"):
            method(a, b[0], 0.5)
        with pytest.raises(ValueError, match=r"one shape .* given \(3, 3\)"):
            method(a[0, 0], b[0, 0], 0.5)
        with pytest.raises(ValueError, match=r"t must be .* shape \(2,\), given \(3,\)"):
            method(a, b, torch.rand(3))


@pytest.mark.parametrize("method", CENTROIDS)
def test_groups_of_wrong_shape_and_impossible_weights_are_refused(method):
    z = noise(3, 4, 8, 8)
    with unchecked():
        with pytest.raises(ValueError, match=r"must have shape \(..., K, C, H, W\), given \(4, 8, 8\)"):
            method(z[0])
        with pytest.raises(ValueError, match=r"must have shape .* given \(0, 4, 8, 8\)"):
            method(z[:0])
        with pytest.raises(ValueError, match=r"weights must have shape \(3,\), one a seed, given \(2,\)"):
            method(z, weights(2))
    for wrong in ([1.0, -0.1, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="finite, at least 0, and not all 0"):
            method(z, torch.tensor(wrong))


def test_the_others_refuse_wrong_shapes_too():
    z = noise(3, 4, 8, 8)
    with unchecked():
        with pytest.raises(ValueError, match="must have shape"):
            cog(z[0], weights(4))
        with pytest.raises(ValueError, match="3 seeds need as many weights"):
            cog(z, weights(5, 2))
        with pytest.raises(ValueError, match="do not fit"):
            cog(z.expand(2, 3, 4, 8, 8), weights(4, 3))
        with pytest.raises(ValueError, match="must have shape"):
            whiten(z[0])
        with pytest.raises(ValueError, match="must have shape"):
            weights_at(weights(3), z[0])
        with pytest.raises(ValueError, match="has 3 coordinates"):
            latents_at(weights(2), z)


@pytest.mark.parametrize(
    "method", [slerp_rescaled, geodesic, normalized, standardized, mode_norm, karcher, geometric_median]
)
def test_a_seed_without_direction_is_refused(method):
    z = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"norm 0|cosine is nan"):
        method(z[0], z[1], 0.5) if method in PAIRS else method(z)


@given(seed=rng_seeds, norm=st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_a_new_norm_keeps_the_direction(seed, norm):
    z = noise(3, 2, 3, 3, seed=seed)
    scaled = to_norm(z, norm)
    exact(scaled.flatten(1).norm(dim=1), torch.full((3,), norm, dtype=torch.float64))
    exact(torch.cosine_similarity(scaled.flatten(1), z.flatten(1)), torch.ones(3, dtype=torch.float64))
