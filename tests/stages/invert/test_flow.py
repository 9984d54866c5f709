"""Rectified-flow inversion against the flow of Gaussian data, which has a closed solution."""

import numpy as np
import pytest
import torch

from stages import schedule
from stages.invert.flow import Flow, integrate

MEAN, DEVIATION = 0.7, 0.4


def width(t):
    return (t**2 * DEVIATION**2 + (1 - t) ** 2) ** 0.5


def velocity(z_BCHW, t):
    """E[data − noise | z_t] for data ~ N(MEAN, DEVIATION²)."""
    return MEAN + (t * DEVIATION**2 - (1 - t)) / width(t) ** 2 * (z_BCHW - t * MEAN)


def transport(z_BCHW, start, end):
    """The exact flow: quantiles stay quantiles."""
    return end * MEAN + (z_BCHW - start * MEAN) * width(end) / width(start)


@pytest.fixture(scope="module")
def flow_backbone(gaussian_backbone):
    """The solved model as a flow, drawn at even times."""

    def make():
        backbone = gaussian_backbone("flow", mean=MEAN, deviation=DEVIATION)
        backbone.schedule = schedule.Flow()
        return backbone

    return make


def test_the_velocity_is_the_derivative_of_the_flow(noise):
    z_BCHW = noise(2, 4, 4, 4, dtype=torch.float64)
    slope_BCHW = (transport(z_BCHW, 0.3, 0.3 + 1e-5) - transport(z_BCHW, 0.3, 0.3 - 1e-5)) / 2e-5
    torch.testing.assert_close(velocity(z_BCHW, 0.3), slope_BCHW, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.0, 1.0)])
def test_each_solver_converges_at_its_order_in_both_directions(noise, solver, order, start, end):
    z_BCHW = noise(3, 4, 4, 4, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160, 320):
        result_BCHW = integrate(velocity, z_BCHW, np.linspace(start, end, steps + 1).tolist(), solver)
        errors.append(float((result_BCHW - transport(z_BCHW, start, end)).norm()))
    orders = -np.diff(np.log2(errors))
    assert np.all(np.abs(orders - order) < 0.2), orders


def test_a_straight_flow_needs_one_step(noise):
    z_BCHW, straight_BCHW = noise(2, 2, 4, 4, 4, dtype=torch.float64)
    for solver in ("euler", "midpoint"):
        noise_BCHW = integrate(lambda z, t: straight_BCHW, z_BCHW, [1.0, 0.0], solver)
        torch.testing.assert_close(noise_BCHW, z_BCHW - straight_BCHW)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 20), ("midpoint", 21)])
def test_the_stage_finds_the_noise_of_an_image(flow_backbone, noise, solver, calls):
    backbone, image_B3hw = flow_backbone(), noise(2, 3, 4, 4).clamp(-1, 1)
    inverted = Flow(Flow.Config(steps=20, solver=solver))(backbone, image_B3hw, "")
    exact_BCHW = transport(backbone.encode(image_B3hw), 1.0, 0.0)
    error = float((inverted.z_BCHW - exact_BCHW).abs().max() / exact_BCHW.abs().max())
    assert error < {"euler": 0.1, "midpoint": 0.01}[solver]
    assert [m["calls"] for m in inverted.measures] == [calls, calls]
    assert len(backbone.batches) == 2 * calls  # down, and up again to measure it
    assert max(m["latent_mse"] for m in inverted.measures) < {"euler": 0.1, "midpoint": 1e-4}[solver]


def test_a_row_knows_neither_its_neighbours_nor_its_slot(flow_backbone, noise):
    image_B3hw = noise(3, 3, 4, 4).clamp(-1, 1)
    poisoned_B3hw = image_B3hw.flip(0)
    poisoned_B3hw[1] = torch.nan
    method = Flow(Flow.Config(steps=5))
    first, other = (method(flow_backbone(), image, "") for image in (image_B3hw, poisoned_B3hw))
    assert torch.equal(other.z_BCHW[2], first.z_BCHW[0])
    assert other.measures[2] == first.measures[0]
