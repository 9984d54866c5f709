"""Traversal: the degradations, the network and what it learns, its file, and how a build knows the file."""

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.ledger import named, replan
from pipeline.parts import part_name, read_table
from pipeline.seeds import load_seeds
from pipeline.store import Store
from schemas.errors import UserError
from schemas.ids import sha256
from stages.combine.direction import exp_map, log_map
from stages.combine.traversal import (
    TASKS,
    Traversal,
    TraversalNetwork,
    coarse,
    from_bytes,
    load_traversal,
    to_bytes,
)
from tests.small_build import drawings, make_config, parts_of, references, seedloom, seeds_recipe  # noqa: F401  fixtures

rng_seeds = st.integers(0, 10**6)
SHAPE = (4, 4, 4)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_network(seed, d=64):
    """One whose last layer is not at its beginning, the identity."""
    torch.manual_seed(seed)
    network = TraversalNetwork(d)
    for parameter in network.mlp[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


# --- degradations ------------------------------------------------------------------------------------------


def test_a_coarse_image_holds_64_numbers_a_colour_and_what_varies_slowly():
    x = 0.1 * noise(0, 100, 3, 64, 64).double()
    assert torch.linalg.matrix_rank(coarse(x)[:, 1].flatten(1), rtol=1e-9) == 64
    assert coarse(x).std() < 0.2 * x.std()
    slope = torch.linspace(-0.8, 0.8, 64).expand(3, 64, 64)
    torch.testing.assert_close(coarse(slope)[..., 16:48], slope[..., 16:48], atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", TASKS)
def test_a_degradation_keeps_size_type_and_every_picture_apart(name):
    x = noise(0, 3, 3, 64, 64).clamp(-1, 1)
    y = TASKS[name](x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(torch.stack([TASKS[name](row) for row in x]), y)


def test_the_hole_is_an_eighth_of_the_side():
    x = torch.zeros(3, 64, 64)
    assert int((TASKS["inpaint"](x)[0] == 1).sum()) == 8 * 8


# --- the network -------------------------------------------------------------------------------------------


@given(seed=rng_seeds, scale=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_sphere_goes_to_itself(seed, scale):
    network, z = random_network(seed), noise(seed + 1, 5, *SHAPE).double()
    moved = network(z)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((5,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(network(scale * z), moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack([network(row) for row in z]), moved, atol=1e-5, rtol=1e-5)
    assert network(z.float()).dtype == torch.float32


def test_before_training_a_seed_stays_where_it_is():
    z = noise(0, *SHAPE)
    torch.testing.assert_close(TraversalNetwork(64)(z), z * 8 / z.norm())


def test_what_is_added_passes_a_bottleneck_and_what_is_there_does_not():
    """The change spans at most 256 dimensions; the seeds that come out, all of them."""
    d = 400
    network = random_network(0, d).double()
    z = noise(1, 600, d)
    with torch.no_grad():
        change = network.mlp(z.double())
        moved = network.float()(z.reshape(600, 4, 10, 10)).double().flatten(1)
    rank = torch.linalg.matrix_rank(change - network.mlp[-1].bias.double(), rtol=1e-8)
    assert 240 < rank <= 256  # a few of the 256 are never above 0
    assert torch.linalg.matrix_rank(moved) == d


def test_a_way_that_is_the_same_for_all_is_learned_and_holds_for_seeds_never_seen():
    torch.manual_seed(0)
    network, way = TraversalNetwork(64), 0.8 * noise(1, *SHAPE)
    source = noise(2, 600, *SHAPE)
    target = exp_map(source, way - (way * source).sum((1, 2, 3), keepdim=True) / 64 * source)

    @torch.no_grad()
    def off(rows):
        return float(log_map(network(source[rows]), target[rows]).flatten(1).norm(dim=1).mean()) / 8

    before = off(slice(500, None))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(60):
        rows = torch.randint(500, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (network(source[rows]) - target[rows]).abs().mean().backward()
        optimizer.step()
    assert off(slice(500, None)) < 0.4 * before


def test_seeds_of_another_size_are_refused():
    with pytest.raises(ValueError, match="seeds of 100 numbers given, those of training had 64"):
        TraversalNetwork(64)(torch.zeros(4, 5, 5))


# --- its file ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A file of a network for seeds of tangram's size, as it is trained."""
    path = tmp_path / "colourise.safetensors"
    path.write_bytes(to_bytes(random_network(0, 1024), {"task": "colourise"}))
    return path


def test_a_file_gives_the_network_back_and_what_is_told_of_it():
    network, z = random_network(3), noise(0, *SHAPE)
    again, about = from_bytes(to_bytes(network, {"task": "inpaint", "backbone": "abc"}))
    assert torch.equal(again(z), network(z))
    assert about == {"d": 64, "task": "inpaint", "backbone": "abc"}


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-5], lambda data: data[8:]])
def test_bytes_that_are_no_traversal_are_refused(spoil):
    with pytest.raises(ValueError, match="no traversal"):
        from_bytes(spoil(to_bytes(random_network(0), {})))


def test_the_settings_know_the_file_by_its_bytes(trained):
    config = Traversal.Config(file=str(trained))
    assert config.sha256 == sha256(trained.read_bytes())
    trained.write_bytes(to_bytes(random_network(1, 1024), {}))
    assert Traversal.Config(file=str(trained)).sha256 != config.sha256
    trained.unlink()
    # a build that is there can be looked at when the file is gone, for its settings hold the hash
    assert Traversal.Config.model_validate(config.model_dump()) == config


def test_a_file_that_changed_or_went_is_named_when_it_is_needed(trained):
    z = noise(0, 1, 4, 16, 16)
    method = Traversal(Traversal.Config(file=str(trained)))
    expected = random_network(0, 1024)(z[0])
    assert torch.equal(method(z, (1.0,), {}), expected)
    with pytest.raises(UserError, match=r"trained on seeds of 1024 numbers.*have 100"):
        method(noise(0, 1, 4, 5, 5), (1.0,), {})
    load_traversal.cache_clear()
    trained.write_bytes(trained.read_bytes() + b" ")
    with pytest.raises(UserError, match="its SHA-256 is"):
        method(z, (1.0,), {})
    trained.unlink()
    with pytest.raises(UserError, match="No such file"):
        method(z, (1.0,), {})
    with pytest.raises(ValidationError, match="cannot be read"):
        Traversal.Config(file=str(trained))


def test_a_build_takes_each_seed_through_the_network_and_another_file_is_another_build(
    tmp_path, references, seedloom, trained  # noqa: F811
):  # fmt: skip
    path = make_config(
        tmp_path,
        references,
        recipes={"whole": seeds_recipe(combine={"method": "traversal", "file": str(trained)})},
        targets=[{"classes": ["gear"], "accepted": 1, "attempts": 4}],
    )
    assert seedloom("build", path).code in (0, 3)
    store, network = Store(str(tmp_path / "out")), random_network(0, 1024)
    plan = replan(store, named(store, None).build_id)
    (stream,) = plan.streams
    seeds = load_seeds(store, stream)
    place = {reference.sha256: k for k, reference in enumerate(seeds.references)}
    rows = read_table(store, part_name(stream, 0), ["parents", "seed_sha256"]).to_pylist()
    assert sorted(row["parents"][0] for row in rows) == sorted(place)
    for row in rows:
        with torch.no_grad():
            z = network(seeds.z_KCHW[place[row["parents"][0]]]).contiguous()
        assert row["seed_sha256"] == sha256(z.numpy().tobytes())

    made = parts_of(tmp_path / "out")
    trained.write_bytes(to_bytes(random_network(1, 1024), {}))
    assert seedloom("build", path).code in (0, 3)
    assert len(parts_of(tmp_path / "out")) == 2 * len(made)

    trained.unlink()
    assert seedloom("status", tmp_path / "out").code == 0
    ended = seedloom("build", path)
    assert ended.code == 2
    assert "cannot be read" in ended.err
    content = yaml.safe_load(path.read_text())
    content["recipes"]["whole"]["combine"]["sha256"] = "0" * 64
    path.write_text(yaml.safe_dump(content))
    ended = seedloom("build", path)
    assert ended.code == 2
    assert "traversal" in ended.err
