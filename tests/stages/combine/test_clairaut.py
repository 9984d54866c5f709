"""Paths in the plane of two seeds, against a minimiser that knows nothing of their form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.linalg import solveh_banded
from scipy.special import gammaln

from stages.combine.clairaut import plane_cost, plane_radii
from stages.combine.nao import line_cost
from stages.combine.radial import radial
from tests.typical_seeds import at_angle


def cost_in_plane(d, r0, r1, theta):
    return float(plane_cost(d, np.array([[r0, r1]]), np.array([theta]))[0])


def newton(d, r0, r1, theta, cells):
    """Minimise Σ w(r̄)·√(Δr² + r̄²Δθ²) over the radii at given angles, dense at both ends.

    Nothing of the theory goes in: w is the printed formula, and the start decays at a guessed rate.
    """
    constant = (d / 2 - 1) * math.log(2) + gammaln(d / 2)
    s = np.linspace(0, 1, cells + 1)
    mesh = theta * (s - 0.9 * np.sin(2 * np.pi * s) / (2 * np.pi))
    h, arc = np.diff(mesh), mesh * math.sqrt(d)
    start, end = (np.exp(-1.9 * part) for part in (arc, arc[-1] - arc))
    sides = np.array([[1, end[0]], [start[-1], 1]])
    r = math.sqrt(d - 1) + np.stack([start, end], axis=1) @ np.linalg.solve(
        sides, np.array([r0, r1]) - math.sqrt(d - 1)
    )
    for _ in range(60):
        a, D = (r[1:] + r[:-1]) / 2, np.diff(r)
        S = np.sqrt(D**2 + (a * h) ** 2)
        w, w1, w2 = constant - (d - 1) * np.log(a) + a**2 / 2, a - (d - 1) / a, 1 + (d - 1) / a**2
        gradient_a, gradient_D = w1 * S + w * a * h**2 / S, w * D / S
        aa = w2 * S + 2 * w1 * a * h**2 / S + w * h**2 * D**2 / S**3
        aD, DD = w1 * D / S - w * a * h**2 * D / S**3, w * (a * h) ** 2 / S**3
        gradient = (gradient_a / 2 - gradient_D)[1:] + (gradient_a / 2 + gradient_D)[:-1]
        diagonal = (aa / 4 - aD + DD)[1:] + (aa / 4 + aD + DD)[:-1]
        step = solveh_banded(np.stack([np.append(0, (aa / 4 - DD)[1:-1]), diagonal]), -gradient)
        r[1:-1] += step
        if np.abs(step).max() < 1e-9:
            return float((w * S).sum()), mesh, r
    raise AssertionError("Newton's method did not converge")


def minimised(d, r0, r1, theta, cells=1000):
    """Its extrapolation to infinitely many cells: the cost, and the radii at angles."""
    coarse, mesh, r_coarse = newton(d, r0, r1, theta, cells)
    fine, _, r_fine = newton(d, r0, r1, theta, 2 * cells)
    return (4 * fine - coarse) / 3, mesh, (4 * r_fine[::2] - r_coarse) / 3


DEPTHS = {
    "typical": (0.6, -0.8),
    "straddling": (-0.9, 0.9),
    "outside": (1.3, 0.5),
    "inside": (-1.0, -0.7),
    "equal": (0.4, 0.4),
    "at the mode": (0.0, 0.3),
}


@pytest.mark.parametrize("d", [1024, 16384])
@pytest.mark.parametrize("degrees", [90, 1, 0.3, 0.05])
@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
def test_equal_to_an_independent_minimisation(d, degrees, depths):
    r0, r1 = (math.sqrt(d - 1) + depth for depth in depths)
    theta = math.radians(degrees)
    expected, mesh, radii = minimised(d, r0, r1, theta)
    assert cost_in_plane(d, r0, r1, theta) == pytest.approx(expected, rel=1e-8)
    path = plane_radii(d, np.array([[r0, r1]]), np.array([theta]), mesh[None] / theta)[0]
    assert path == pytest.approx(radii, abs=1e-5)


@pytest.mark.parametrize("d", [4, 64])
@pytest.mark.parametrize("degrees", [120, 40, 5])
@pytest.mark.parametrize("ratios", [(0.9, 1.1), (1.2, 1.05), (0.7, 0.9), (1.05, 1.05)])
def test_few_dimensions_where_the_two_ends_feel_each_other(d, degrees, ratios):
    r0, r1 = (ratio * math.sqrt(d - 1) for ratio in ratios)
    theta = math.radians(degrees)
    expected, mesh, radii = minimised(d, r0, r1, theta)
    assert cost_in_plane(d, r0, r1, theta) == pytest.approx(expected, rel=1e-8)
    path = plane_radii(d, np.array([[r0, r1]]), np.array([theta]), mesh[None] / theta)[0]
    assert path == pytest.approx(radii, abs=1e-5)


@pytest.mark.parametrize("depths", [(0.6, -0.8), (1.3, 0.5), (-1.0, -0.7)])
def test_the_two_forms_of_the_solution_meet(depths):
    """Beyond some arc f grows by exactly m* a radian; the change of form lies within these angles."""
    g = radial(1024)
    theta = np.linspace(20, 60, 41) / g.kappa
    r = np.tile(g.mode + np.array([depths]), (41, 1))
    cost = plane_cost(1024, r, theta)
    assert np.diff(cost) == pytest.approx(g.m * np.diff(theta), rel=1e-7)
    inside = plane_radii(1024, r, theta, np.full((41, 1), 1 / 3))
    assert inside[-1] == pytest.approx(g.best, abs=1e-6)
    assert (np.diff(np.abs(inside[:, 0] - g.best)) < 1e-12).all()


@given(
    d=st.sampled_from([64, 1024, 16384]),
    ratios=st.tuples(st.floats(0.4, 3), st.floats(0.4, 3)),
    theta=st.floats(1e-3, 3),
)
@example(d=16384, ratios=(0.7, 0.72), theta=0.2)  # across, although the way by r* would have σ = 0
@example(d=16384, ratios=(0.7, 0.72), theta=0.5)  # and by r*
@example(d=64, ratios=(0.5, 0.984375), theta=0.125)  # too close to reach r*: m*θ + E would be less
@settings(deadline=None, max_examples=40)
def test_no_dearer_than_the_chord_the_rim_or_the_way_by_r_star(d, ratios, theta):
    """Far from r* there are several candidates; at least these ways must not be better."""
    g = radial(d)
    r0, r1 = (ratio * g.mode for ratio in ratios)
    cost = cost_in_plane(d, r0, r1, theta)

    def radial_cost(a, b):
        return abs(quad(lambda s: float(g.weight(s)), a, b, epsrel=1e-10)[0])

    along = radial_cost(r0, r1)
    assert cost >= along * (1 - 1e-9)
    for r in (r0, r1):
        assert cost <= (along + r * float(g.weight(r)) * theta) * (1 + 1e-9)
    assert cost <= float(line_cost(torch.stack(at_angle(d, r0, r1, theta)))) * (1 + 1e-9)
    assert cost <= (radial_cost(r0, g.best) + g.m * theta + radial_cost(g.best, r1)) * (1 + 1e-9)
