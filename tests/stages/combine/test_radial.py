"""NAO's weight, its constants, and the layer between a norm and r*, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from stages.combine.radial import radial


def test_constants_of_stable_diffusion():
    g = radial(16384)
    assert g.floor == pytest.approx(0.572360, abs=5e-7)
    assert g.m == pytest.approx(73.259186, abs=5e-7)
    assert g.best == pytest.approx(127.993858, abs=5e-7)
    assert float(g.weight(90.5)) == pytest.approx(1583.36, abs=5e-3)


@pytest.mark.parametrize("d", [4, 5, 16, 19, 21, 64, 1024, 16384])
def test_the_weight_is_minus_the_log_density_of_the_norm(d):
    r = math.sqrt(d) * np.array([0.36, 0.7, 0.99, 1, 1.01, 1.5, 9.9])
    expected = -stats.chi.logpdf(r, d)
    assert radial(d).weight(r) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert radial(d).floor == pytest.approx(-stats.chi.logpdf(math.sqrt(d - 1), d), abs=1e-10)


@pytest.mark.parametrize("d", [4, 64, 16384])
def test_a_great_circle_is_cheapest_at_r_star(d):
    g = radial(d)
    r = g.best + np.array([-1e-3, 0, 1e-3])
    around = r * g.weight(r)
    assert around[1] == pytest.approx(g.m, rel=1e-12)
    assert around[0] > around[1] < around[2]
    assert math.sqrt(d - 1) - g.best == pytest.approx(0.28 / math.sqrt(d - 1), rel=0.15)


@pytest.mark.parametrize("d", [4, 64, 1024, 16384])
@pytest.mark.parametrize("ratio", [0.36, 0.72, 0.995, 1, 1.01, 1.3, 3.0])
def test_the_layer_between_a_norm_and_r_star(d, ratio):
    g = radial(d)
    r = ratio * math.sqrt(d - 1)
    expected = quad(lambda s: math.sqrt(max(0, g.weight(s) ** 2 - (g.m / s) ** 2)), g.best, r, epsrel=1e-11)[
        0
    ]
    u = g.depth(np.array([r]))
    E, Y = g.layer(u)
    assert E[0] == pytest.approx(abs(expected), rel=1e-7, abs=1e-9)
    assert g.unlayer(Y) == pytest.approx(u, rel=1e-11)
    # the angle from here to a tenth of the depth is the logarithm of what Y has decayed by
    swept = quad(
        lambda s: g.m / (s * math.sqrt((s * g.weight(s)) ** 2 - g.m**2)), g.best * (1 + u[0] / 10), r
    )[0]
    assert math.log(Y[0] / g.layer(u / 10)[1][0]) / g.kappa == pytest.approx(abs(swept), rel=1e-6)
