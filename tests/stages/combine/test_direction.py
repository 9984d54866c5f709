"""Directions: the edits, the sphere's three maps, the angles, and an edit learned from some seeds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.ledger import named, replan
from pipeline.parts import part_name, read_table
from pipeline.seeds import load_seeds
from pipeline.store import Store
from pipeline.tensors import artifact_name, read_tensors
from schemas.ids import sha256
from stages.combine.direction import (
    EDITS,
    Direction,
    apply_direction,
    exp_map,
    gathered,
    log_map,
    mean_angle,
    pairwise_angles,
    transport,
)
from stages.contract import Chance
from tests.small_build import drawings, make_config, references, seedloom, seeds_recipe  # noqa: F401  fixtures

rng_seeds = st.integers(0, 10**6)
SHAPE = (4, 6, 6)
RADIUS = 12.0


def noise(seed, *batch, shape=SHAPE):
    return torch.randn(*batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tangent(z, seed, *batch):
    """A random vector orthogonal to z, of about the length of z."""
    v = noise(seed, *batch)
    return v - (v * z).sum((-3, -2, -1), keepdim=True) / z.square().sum((-3, -2, -1), keepdim=True) * z


def dot(a, b):
    return (a * b).sum((-3, -2, -1))


# --- edits -------------------------------------------------------------------------------------------------


def pictures(seed, size=32):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", EDITS)
@given(seed=rng_seeds)
@settings(max_examples=20, deadline=None)
def test_an_edit_keeps_range_type_and_every_picture_apart(name, seed):
    x = pictures(seed)
    y = EDITS[name](x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.abs().max() <= 1 + 1e-6
    assert torch.equal(x, pictures(seed))  # the pictures given are left as they are
    torch.testing.assert_close(torch.stack([EDITS[name](row) for row in x]), y)


def test_blur_is_a_gaussian_of_a_thirty_second_of_the_side():
    for size in (64, 128):
        point = torch.zeros(1, 3, size, size, dtype=torch.float64)
        point[..., size // 2, size // 2] = 1
        spread = EDITS["blur"](point)[0, 0]
        place = torch.arange(size, dtype=torch.float64) - size // 2
        assert float(spread.sum()) == pytest.approx(1)
        for line in (spread.sum(0), spread.sum(1)):
            assert float((line * place.square()).sum()) == pytest.approx((size / 32) ** 2, rel=5e-3)
    flat = torch.full((3, 40, 40), 0.3)
    torch.testing.assert_close(EDITS["blur"](flat), flat)  # up to the edges


def test_grey_is_the_luminance_and_changes_nothing_twice():
    x = pictures(0)
    y = EDITS["grey"](x)
    assert torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(y[:, 0], y[:, 2])
    torch.testing.assert_close(y[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    torch.testing.assert_close(EDITS["grey"](y), y)


def test_the_box_is_white_central_and_a_quarter_of_the_side():
    x = pictures(0, size=64)
    y = EDITS["box"](x)
    changed = (y != x).any(1)
    assert (y.movedim(1, -1)[changed] == 1).all()
    rows = changed[0].any(1).nonzero().flatten()
    columns = changed[0].any(0).nonzero().flatten()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 39, 24, 39)


# --- the sphere --------------------------------------------------------------------------------------------


@given(seed=rng_seeds, scale=st.floats(0.1, 10), near=st.sampled_from([1.0, 1e-3, 1e-7]))
@settings(max_examples=50, deadline=None)
def test_the_exp_map_undoes_the_log_map(seed, scale, near):
    a = noise(seed)
    b = scale * (a + near * noise(seed + 1))
    v = log_map(a, b)
    cosine = float(dot(a, b) / (a.norm() * b.norm()))
    assert float(dot(v, a)) == pytest.approx(0, abs=1e-9)
    if near == 1.0:
        assert float(v.norm()) == pytest.approx(RADIUS * math.acos(cosine))
    torch.testing.assert_close(exp_map(a, v), b * RADIUS / b.norm(), atol=1e-12, rtol=1e-12)
    assert float(exp_map(a, v / 3).norm()) == pytest.approx(RADIUS)
    torch.testing.assert_close(log_map(a, exp_map(a, v / 3)), v / 3, atol=1e-10, rtol=1e-10)


def test_the_way_to_itself_is_nowhere():
    a = noise(0)
    assert not log_map(a, 2 * a).any()
    torch.testing.assert_close(exp_map(a, torch.zeros_like(a)), a * RADIUS / a.norm())


@given(seed=rng_seeds)
@settings(max_examples=50, deadline=None)
def test_transport_keeps_lengths_and_angles_and_the_geodesic_goes_on(seed):
    a, b = noise(seed), noise(seed + 1)
    v, w = tangent(a, seed + 2), tangent(a, seed + 3)
    at_b = [transport(a, b, x) for x in (v, w)]
    assert [float(dot(x, b)) for x in at_b] == pytest.approx([0, 0], abs=1e-9)
    assert float(dot(*at_b)) == pytest.approx(float(dot(v, w)), abs=1e-9)
    assert float(at_b[0].norm()) == pytest.approx(float(v.norm()))
    torch.testing.assert_close(transport(b, a, at_b[0]), v)
    torch.testing.assert_close(transport(a, b, log_map(a, b)), -log_map(b, a))
    aside = v - dot(v, log_map(a, b)) / log_map(a, b).square().sum() * log_map(a, b)
    torch.testing.assert_close(transport(a, b, aside), aside)  # what leaves the plane alone is left alone


@given(seed=rng_seeds)
@settings(max_examples=20, deadline=None)
def test_transport_is_the_limit_of_schilds_ladder(seed):
    """Thin parallelograms, built of geodesics alone, carry a vector to the same place."""
    a, b = noise(seed), noise(seed + 1)
    v = tangent(a, seed + 2)
    errors = []
    for size in (1e-2, 1e-3):
        z, carried = exp_map(a, torch.zeros_like(a)), v
        for k in range(8):
            after = exp_map(a, (k + 1) / 8 * log_map(a, b))
            tip = exp_map(z, size * carried)
            middle = exp_map(tip, log_map(tip, after) / 2)
            carried = log_map(after, exp_map(z, 2 * log_map(z, middle))) / size
            z = after
        errors.append(float((carried - transport(a, b, v)).norm() / v.norm()))
    assert errors[1] < 0.2 * errors[0] < 0.02


@given(seed=rng_seeds)
@settings(max_examples=20, deadline=None)
def test_a_batch_is_a_loop_and_the_type_is_kept(seed):
    a, b, v = noise(seed, 2, 3), noise(seed + 1, 2, 3), noise(seed + 2, 2, 3)
    for name, f, inputs in (
        ("log", log_map, (a, b)),
        ("exp", exp_map, (a, v)),
        ("move", transport, (a, b, v)),
    ):
        whole = f(*inputs)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(whole[i, j], f(*(x[i, j] for x in inputs)), msg=name)
        assert f(*(x.float() for x in inputs)).dtype == torch.float32
    whole = apply_direction(a, b[0, 0], v[0, 0], 0.7)
    torch.testing.assert_close(whole[1, 2], apply_direction(a[1, 2], b[0, 0], v[0, 0], 0.7))
    assert apply_direction(a.float(), b[0, 0].float(), v[0, 0].float()).dtype == torch.float32


def test_opposite_seeds_and_seeds_of_no_length_are_refused():
    a = noise(0)
    for f in (
        lambda: log_map(a, -2 * a),
        lambda: transport(a, -a, noise(1)),
        lambda: apply_direction(a, -a, noise(1)),
    ):
        with pytest.raises(ValueError, match="opposite"):
            f()
    with pytest.raises(ValueError, match="no direction"):
        log_map(a, torch.zeros_like(a))
    with pytest.raises(ValueError, match="no direction"):
        gathered(torch.stack([a, -a]), torch.stack([noise(1), noise(2)]))  # no middle


# --- directions --------------------------------------------------------------------------------------------


def test_one_offset_for_all_images_has_no_angle():
    z = noise(0, 10)
    offset = noise(1)
    assert mean_angle(z + offset - z) == pytest.approx(0, abs=1e-6)
    assert mean_angle(torch.stack([offset, -offset])) == pytest.approx(math.pi)


def test_independent_directions_are_orthogonal_within_their_spread():
    d = 1024
    angles = pairwise_angles(noise(0, 40, shape=(4, 16, 16)))
    pairs = angles[torch.triu_indices(40, 40, 1).unbind()]
    assert float((pairs - math.pi / 2).std()) == pytest.approx(1 / d**0.5, rel=0.1)
    assert float((pairs - math.pi / 2).abs().max()) < 5 / d**0.5
    torch.testing.assert_close(angles, angles.T)


@given(seed=rng_seeds)
@settings(max_examples=20, deadline=None)
def test_a_change_of_norm_alone_is_no_direction(seed):
    """Where a difference points back along its own seed, a tangent vector sees only what moved sideways."""
    z = noise(seed, 6)
    base, directions = gathered(z, 0.7 * z)
    assert mean_angle(0.7 * z - z) > 1
    assert float(directions.norm()) < 1e-9 * float(base.norm())
    assert float(base.norm()) == pytest.approx(RADIUS)


@given(seed=rng_seeds, strength=st.floats(-2, 2), scale=st.floats(0.5, 2))
@settings(max_examples=50, deadline=None)
def test_a_shared_direction_moves_an_unseen_seed_as_it_moved_the_others(seed, strength, scale):
    """Seeds moved by the transports of one vector give that vector back, and it moves the next seed alike."""
    z = noise(seed, 5)
    middle = (z / z.flatten(1).norm(dim=1)[:, None, None, None]).mean(0)
    v = 0.3 * tangent(middle, seed + 1)
    here = middle.expand(z.shape)
    base, directions = gathered(z, 3 * exp_map(z, transport(here, z, v.expand(z.shape))))
    assert mean_angle(directions) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(directions.mean(0), v, atol=1e-9, rtol=1e-9)
    unseen = scale * noise(seed + 2)
    moved = apply_direction(unseen, base, directions.mean(0), strength)
    expected = exp_map(unseen, strength * transport(middle, unseen, v))
    torch.testing.assert_close(moved, expected * unseen.norm() / RADIUS, atol=1e-8, rtol=1e-8)
    assert float(moved.norm()) == pytest.approx(float(unseen.norm()))
    back = apply_direction(moved, base, directions.mean(0), 0.0)
    torch.testing.assert_close(back, moved)


@given(seed=rng_seeds)
@settings(max_examples=20, deadline=None)
def test_turning_everything_turns_the_result(seed):
    d = math.prod(SHAPE)
    turn = torch.linalg.qr(noise(seed, shape=(d, d)))[0]

    def turned(x):
        return (x.flatten(-3) @ turn.T).reshape(x.shape)

    z, edited, unseen = noise(seed + 1, 4), noise(seed + 2, 4), noise(seed + 3)

    def result(*seeds):
        base, directions = gathered(seeds[0], seeds[1])
        return apply_direction(seeds[2], base, directions.mean(0), 0.5)

    torch.testing.assert_close(result(*map(turned, (z, edited, unseen))), turned(result(z, edited, unseen)))


def test_too_few_directions_and_directions_of_no_length_are_refused():
    with pytest.raises(ValueError, match="needs two"):
        mean_angle(noise(0, 1))
    with pytest.raises(ValueError, match="length 0"):
        pairwise_angles(torch.zeros(2, *SHAPE))


# --- the stage ---------------------------------------------------------------------------------------------


def test_every_seed_is_used_before_any_is_used_again():
    method = Direction(Direction.Config(edit="blur", strength=0.5))
    draws = [method.draw(Chance(i, (7, "combine")), 5) for i in range(500)]
    orders = [tuple(draw.parents[0] for draw in draws[i : i + 5]) for i in range(0, 500, 5)]
    assert {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3, 4)}
    assert len(set(orders)) > 50  # of 120: each round has an order of its own
    assert {draw.weights for draw in draws} == {(0.5,)}
    assert method.seeds_needed() == 2


def test_a_strength_that_is_not_set_is_uniform():
    method = Direction(Direction.Config(strength=None))
    drawn = np.sort([method.draw(Chance(i, (7, "combine")), 5).weights[0] for i in range(2000)])
    assert np.abs(drawn - (np.arange(2000) + 0.5) / 2000).max() < 1.63 / 2000**0.5  # KS at 1 %


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_on_a_model_that_is_solved_exactly_the_edit_of_some_is_the_edit_of_another(
    gaussian_backbone, prediction_type
):
    """Its inversion is affine, so pictures that are equal under the box are all moved by one offset."""
    backbone = gaussian_backbone(prediction_type, deviation=1.0, mean=0.0)
    start, end = (backbone.schedule.level(t) for t in (0, 999))

    def invert(image_N3hw):
        return backbone.transport(backbone.encode(image_N3hw), start, end)

    image = noise(0, 9, shape=(3, 32, 32))
    image[..., 12:20, 12:20] = 0.1  # what the box will cover
    seeds, edited = invert(image), invert(EDITS["box"](image))
    assert mean_angle(edited - seeds) == pytest.approx(0, abs=1e-6)
    method = Direction(Direction.Config(edit="box"))
    artifact = method.prepare(invert, image[:8], seeds[:8])
    moved = method(seeds[8:], (1.0,), artifact)

    def off(z):  # angle to the really edited seed
        return float(log_map(z, edited[8]).norm()) / z.numel() ** 0.5

    assert off(moved) < 0.1 * off(seeds[8])


def test_a_build_moves_each_seed_along_the_direction_of_its_class(tmp_path, references, seedloom):  # noqa: F811
    combine = {"method": "direction", "edit": "grey", "strength": 0.5}
    path = make_config(
        tmp_path,
        references,
        recipes={"greyed": seeds_recipe(combine=combine)},
        targets=[{"classes": ["gear", "ring"], "accepted": 2, "attempts": 8}],
    )
    ended = seedloom("build", path)
    assert ended.code in (0, 3), ended.err
    store = Store(str(tmp_path / "out"))
    plan = replan(store, named(store, None).build_id)
    moved = {}
    for stream in plan.streams:
        artifact = read_tensors(store, artifact_name(stream.artifacts["combine"]))
        seeds = load_seeds(store, stream)
        place = {reference.sha256: k for k, reference in enumerate(seeds.references)}
        rows = read_table(store, part_name(stream, 0), ["parents", "weights", "seed_sha256"]).to_pylist()
        assert sorted(row["parents"][0] for row in rows) == sorted(place)  # four seeds, four candidates
        for row in rows:
            z = seeds.z_KCHW[place[row["parents"][0]]]
            expected = apply_direction(z, artifact["base_CHW"], artifact["direction_CHW"], 0.5)
            assert row["weights"] == [0.5]
            assert row["seed_sha256"] == sha256(expected.contiguous().numpy().tobytes())
        moved[stream.label] = artifact["direction_CHW"]
    assert not torch.equal(moved["gear"], moved["ring"])


def test_an_edit_that_there_is_not_names_those_that_there_are():
    with pytest.raises(ValidationError, match="'blur', 'grey' or 'box'"):
        Direction.Config(edit="sharpen")
