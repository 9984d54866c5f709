"""The weight of NAO along the radius, w(r) = −log χ_d(r); its cheapest circle; the layers that lead there.

Samuel et al., NeurIPS 2023, Eq. 1: χ_d(r) = r^(d−1)·e^(−r²/2)/(2^(d/2−1)·Γ(d/2)) is the density of the norm
of a Gaussian seed. With the mode r0 = √(d−1) and ρ = r/r0,

    w(r) = w(r0) + (d−1)/2·(ρ² − 1 − ln ρ²),    w(r0) = ½ ln π + (d−1)/2·ln(1 + 1/(d−1)) − ½ + S(d/2),

S being the rest of Stirling's series. Departure: summed as it is printed, the formula has terms as large as
4·d, which leaves w ≈ 0.57 ten digits in float64 and two in float32; in this form nothing cancels.

A path of least ∫ w(|γ|)|dγ| lies in the plane of its ends and conserves c = m·sin ψ, where m(r) = r·w(r) and
ψ is its angle to the radius (Clairaut). m has its least value m* at r*, a little inside r0, and grows from
there: outwards for ever, inwards down to about r0/4. Let u = r/r* − 1 (the depth), m = m* + p² with the sign
of p that of u, and σ = c − m*. In p the integrals are regular, with J(p; c) = 1/(r·p'(r)·√(m + c)):

    dθ = c·J·dp/√(p² − σ),    cost = c·θ + ∫ (m + c)·J·√(p² − σ)·dp.

At σ = 0 a path winds on to r* for ever. Then E(u) = ∫₀^u p·√(m + m*)·du/(1 + u) is what a seed pays for its
norm, and with K = κ·dθ/(du/u), K(0) = 1, Y(u) = p'(0)·u·exp ∫₀^u (K − 1)·du/u decays along the path just as
e^(−κθ).

Everything here is float64 on norms and angles: where a seed points to plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

LEAST, MOST = 0.35, 10.0  # norms, of √(d−1): below, m(r) soon falls and the cheapest way may be another
SERIES = 0.03  # |u| up to which ten terms of ln(1 + u) are exact to rounding
TERMS = [(-1) ** k / (k + 3) for k in range(10)]  # of (ln(1 + u) − u + u²/2)/u³
NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)


def stirling(a: float) -> float:
    """ln Γ(a) − [(a − ½)·ln a − a + ½ ln 2π]."""
    if a < 10:
        return float(gammaln(a)) - ((a - 0.5) * math.log(a) - a + 0.5 * math.log(2 * math.pi))
    x = 1 / a**2
    return (1 / 12 - x * (1 / 360 - x * (1 / 1260 - x / 1680))) / a


class Radial:
    """Constants and functions of the radius in d dimensions; `radial(d)` keeps one for each d."""

    def __init__(self, d: int):
        if d < 4:
            raise ValueError(f"NAO needs seeds of at least 4 elements, given {d}")
        self.d, self.n = d, d - 1
        self.mode = math.sqrt(self.n)  # r0
        self.floor = 0.5 * math.log(math.pi) + self.n / 2 * math.log1p(1 / self.n) - 0.5 + stirling(d / 2)

        def slope(rho: float) -> float:
            """m'(r)/(d − 1) = (w + r²)/(d − 1) − 1; the other root is where m is largest."""
            return self.floor / self.n - math.log(rho) - 1.5 + 1.5 * rho**2

        self.best = self.mode * brentq(slope, 3**-0.5, 1, xtol=1e-16, rtol=1e-15)  # r*
        self.w = float(self.weight(self.best))  # w(r*)
        self.m = self.best * self.w  # m*
        self.stiff = math.sqrt(self.best * (self.best**2 - self.w / 2))  # dp/du at 0
        self.kappa = self.stiff * math.sqrt(2 / self.m)
        inwards, outwards = 1 - LEAST * self.mode / self.best, MOST * self.mode / self.best - 1
        self._u = np.concatenate([-np.geomspace(inwards, 1e-4, 128), [0], np.geomspace(1e-4, outwards, 128)])
        self._p, self._Y = self._u * self.rise(self._u)[0], self.layer(self._u)[1]

    def weight(self, r: float | np.ndarray) -> float | np.ndarray:
        """w(r)."""
        v = (r - self.mode) * (r + self.mode) / self.n
        return np.asarray(self.floor + self.n / 2 * (v - np.log1p(v)))

    def depth(self, r: np.ndarray) -> np.ndarray:
        """u of each norm; refuses those that no seed has."""
        if not np.all((r >= LEAST * self.mode) & (r <= MOST * self.mode)):
            raise ValueError(
                f"NAO is for seeds, whose norms in {self.d} dimensions are near {self.mode:.4g}; given"
                f" {np.min(r):.4g} to {np.max(r):.4g}, allowed {LEAST * self.mode:.4g} to"
                f" {MOST * self.mode:.4g}: rescale them first"
            )
        return r / self.best - 1

    def rise(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p/u and dp/du.

        m − m* = r*·u²·Q(u) and m' = u·M(u), written with l = (ln(1 + u) − u + u²/2)/u³ and w* + r*² = d − 1.
        """
        small = np.abs(u) < SERIES
        v = np.where(small, SERIES, u)
        series = np.polynomial.polynomial.polyval(np.where(small, u, 0), TERMS)
        squared, bent = self.best**2, u * np.where(small, series, (np.log1p(v) - v + v**2 / 2) / v**3)
        Q = self.w * ((u - 1) / 2 - (1 + u) * bent) + squared * (1 + u) * (1 - bent)
        M = squared * (2 + 2 * u - u * bent) - self.w * (1 - u / 2 + u * bent)
        root = np.sqrt(self.best * Q)
        return root, self.best * M / (2 * root)

    def sink(self, p: np.ndarray) -> np.ndarray:
        """The depth of each p."""

        def newton(u: np.ndarray) -> np.ndarray:
            root, slope = self.rise(u)
            return (u * root - p) / slope

        return self._invert(self._p, p, newton)

    def J(self, p: np.ndarray, c: float | np.ndarray) -> np.ndarray:
        u = self.sink(p)
        return 1 / ((1 + u) * self.rise(u)[1] * np.sqrt(self.m + p**2 + c))

    def layer(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E and Y of each depth: what it costs to leave it for r*, and how far the path still feels it."""
        E, lengthen, _ = self._layer(u)
        return E, self.stiff * u * lengthen

    def unlayer(self, Y: np.ndarray) -> np.ndarray:
        """The depth of each Y."""
        u, far = Y / self.stiff, np.abs(Y) > 1e-9  # elsewhere the two are equal to rounding
        goal = u[far]

        def newton(u: np.ndarray) -> np.ndarray:
            _, lengthen, K = self._layer(u)
            return u * np.log(u * lengthen / goal) / K

        u[far] = self._invert(self._Y, Y[far], newton)
        return u

    def _layer(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E, exp ∫(K − 1)·du/u and K."""
        x, weights = ((NODES + 1) / 2) ** 2, WEIGHTS * (NODES + 1) / 2  # of ∫₀¹, denser where p is small
        inner = u[..., None] * np.append(x, 1)
        root = self.rise(inner)[0]
        p, pull = inner * root, np.sqrt(2 * self.m + (inner * root) ** 2)
        K = self.kappa * self.m / (root * (1 + inner) * pull)
        E = u * ((p * pull / (1 + inner))[..., :-1] @ weights)
        return E, np.exp(((K[..., :-1] - 1) / x) @ weights), K[..., -1]

    def _invert(
        self, table: np.ndarray, goal: np.ndarray, newton: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """The depths at which a growing function, known at the depths of the table, is `goal`."""
        above = np.clip(np.searchsorted(table, goal), 1, len(table) - 1)
        low, high = self._u[above - 1], self._u[above]
        u = np.interp(goal, table, self._u)
        for _ in range(50):
            last, u = u, np.clip(u - newton(u), low, high)
            if np.all(np.abs(u - last) <= 1e-8 * np.abs(u)):  # the next step would be the square of this one
                break
        return u


radial = cache(Radial)
