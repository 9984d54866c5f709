"""The cheapest path of NAO between two points of a plane, given by their radii and the angle between them.

Notation and integrals: `stages.combine.radial`. Far apart, where |σ| is below rounding, a path consists of
the two layers at its ends and an arc at r* between them (the separatrix form); φ is the angle from its first
end:

    f = m*·θ + E_1 + E_2,    Y(φ) = Y_1·e^(−κφ) + Y_2·e^(−κ(θ−φ)).

That is every pair of independent seeds of a usual size: their σ ≈ 4·Y_1·Y_2·e^(−κθ) is about e^(−375) at d =
16,384. Nearer pairs are solved for σ, by Brent's method in a logarithm of it or of its distance from its
bound. τ makes the integrands smooth: p = ±√σ·cosh τ or ±√−σ·sinh τ. There are two families:

- p is monotone: c runs from 0 (radial) to m at the end nearer to r*, or to m* if r* lies between the ends;
- p turns: both ends lie on one side of r*, and the path comes nearer to r* than either.

Far from r* several paths satisfy the equations (one cuts across, one dives to r*): all are found, and the
cheapest is taken.

Shape letters: N pairs, 2 their ends, S paths that are tried, T points of a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from stages.combine.radial import NODES, WEIGHTS, Radial, radial

NOTHING = 1e-14  # |σ|/m* that changes no digit any more
DEEP = 40.0  # −ln of the relative distance from a bound, beyond which σ is below that
CELLS = 128  # in which τ is tabulated over the angle
FEW_NODES, FEW_WEIGHTS = np.polynomial.legendre.leggauss(12)


@dataclass(frozen=True)
class Arc:
    """Paths that are not far: σ, c, and the range of τ. At its upper end p has the sign `side`."""

    g: Radial
    side: float
    sigma: Float[np.ndarray, " S"]
    c: Float[np.ndarray, " S"]
    low: Float[np.ndarray, " S"]
    high: Float[np.ndarray, " S"]

    def p(self, tau: Float[np.ndarray, "#S T"]) -> tuple[Float[np.ndarray, "S T"], Float[np.ndarray, "S T"]]:
        """p and √(p² − σ)."""
        sigma = self.sigma[:, None]
        scale, turns = np.sqrt(np.abs(sigma)), sigma > 0
        sinh, cosh = np.sinh(tau), np.cosh(tau)
        return self.side * scale * np.where(turns, cosh, sinh), scale * np.where(turns, sinh, cosh)

    def angle(self) -> Float[np.ndarray, " S"]:
        c = self.c[:, None]
        return self._integral(lambda p, q: c * self.g.J(p, c))

    def cost(self, angle: float) -> Float[np.ndarray, " S"]:
        """c·θ + ∫(m + c)·J·√(p² − σ)·dp: stationary in c, so that its rounding does not count."""
        c = self.c[:, None]
        return self.c * angle + self._integral(lambda p, q: (2 * c + q**2) * self.g.J(p, c) * q**2)

    def _integral(self, rate: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Float[np.ndarray, " S"]:
        """Over τ, cut at 0, where p turns or crosses r*."""
        low, high = (
            np.stack([np.minimum(tau, 0), np.maximum(tau, 0)], axis=1)[..., None]
            for tau in (self.low, self.high)
        )
        half, shape = (high - low) / 2, (len(low), -1)
        tau = (low + half * (1 + NODES)).reshape(shape)
        return (rate(*self.p(tau)) * (half * WEIGHTS).reshape(shape)).sum(axis=1)

    def at(self, t_T: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
        """p of one path where a fraction t of its angle is behind (radial: as the angle goes to 0)."""

        def rate(tau: np.ndarray) -> np.ndarray:
            return self.g.J(self.p(tau.reshape(1, -1))[0], self.c).reshape(tau.shape)

        def swept(low: np.ndarray, high: np.ndarray) -> np.ndarray:
            half = (high - low) / 2
            return rate((low + half)[:, None] + half[:, None] * FEW_NODES) @ FEW_WEIGHTS * half

        edge = np.linspace(self.low[0], self.high[0], CELLS + 1)
        behind = np.concatenate([[0.0], np.cumsum(swept(edge[:-1], edge[1:]))])
        goal = t_T * behind[-1]
        cell = np.clip(np.searchsorted(behind, goal) - 1, 0, CELLS - 1)
        tau = np.interp(goal, behind, edge)
        for _ in range(8):
            over = behind[cell] + swept(edge[cell], tau) - goal
            tau = np.clip(tau - over / rate(tau), edge[cell], edge[cell + 1])
        return self.p(tau[None])[0][0]


def near(g: Radial, p_2: Float[np.ndarray, " 2"], angle: float) -> Arc | None:
    """The cheapest path between two ends; None where that is the separatrix form."""
    a, b = (float(p) for p in sorted(p_2, key=abs))
    side = 1.0 if b > 0 else -1.0
    a, b = side * a, side * b
    bound = max(a, 0.0) ** 2  # σ of the last monotone path

    def monotone(v: float) -> Arc:
        """c is 1 − e^(−v) of its bound."""
        rest = (g.m + bound) * np.exp(-v)
        sigma = bound - rest or -np.finfo(float).tiny
        if sigma > 0:
            low, high = np.sqrt(rest / sigma), np.sqrt((b**2 - bound + rest) / sigma)
        else:
            low, high = a / np.sqrt(-sigma), b / np.sqrt(-sigma)
        c = -(g.m + bound) * np.expm1(-v)
        return Arc(g, side, *np.array([[sigma], [c], [np.arcsinh(low)], [np.arcsinh(high)]]))

    def turning(tau: float | np.ndarray) -> Arc:
        """τ runs from the nearer end to the turn."""
        tau = np.atleast_1d(tau)
        sigma = bound / np.cosh(tau) ** 2
        high = np.sqrt((b**2 - bound) / sigma + np.sinh(tau) ** 2)
        return Arc(g, side, sigma, g.m + sigma, -tau, np.arcsinh(high))

    def solve(family: Callable[[float], Arc], low: float, high: float) -> Arc:
        return family(brentq(lambda x: family(x).angle()[0] - angle, low, high, xtol=1e-300, rtol=1e-14))

    found: list[tuple[float, Arc | None]] = []
    if monotone(DEEP).angle()[0] >= angle:
        arc = solve(monotone, 0.0, DEEP)
        found.append((arc.cost(angle)[0], arc))
    if bound > 0 and angle > 0:
        # where m* outweighs p² the angle grows with τ; before, it may rise and fall
        tau = np.append(np.linspace(0, 2 + max(0, np.log(2 * a / np.sqrt(g.m))), 24), DEEP)
        more = turning(tau).angle() > angle
        for i in np.flatnonzero(more[1:] != more[:-1]):
            arc = solve(turning, tau[i], tau[i + 1])
            found.append((arc.cost(angle)[0], arc))
        if not more[-1]:
            ends = g.layer(g.sink(side * np.array([a, b])))[0]
            found.append((g.m * angle + float(ends.sum()), None))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def arcs(g: Radial, u_N2: Float[np.ndarray, "N 2"], angle_N: Float[np.ndarray, " N"]) -> dict[int, Arc]:
    """The pairs whose path is not far. An arc runs from the end with the smaller |p|."""
    p_N2, Y_N2 = u_N2 * g.rise(u_N2)[0], g.layer(u_N2)[1]
    decay_N = np.exp(-g.kappa * angle_N)
    sigma_N = 4 * decay_N * (np.abs(Y_N2.prod(axis=1)) + decay_N * (Y_N2**2).sum(axis=1))
    # outside r*, a path that cuts across covers less than 1.5 times its depth
    nearer_N = np.where(p_N2.prod(axis=1) > 0, np.abs(u_N2 / (1 + np.minimum(u_N2, 0))).min(axis=1), 0)
    possible_N = (sigma_N > NOTHING * g.m) | (angle_N < 2 * nearer_N)
    found = {int(i): near(g, p_N2[i], angle_N[i]) for i in np.flatnonzero(possible_N)}
    return {i: arc for i, arc in found.items() if arc}


def plane_cost(
    d: int, r_N2: Float[np.ndarray, "N 2"], angle_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """f of each pair."""
    g = radial(d)
    u_N2 = g.depth(r_N2)
    cost_N = g.m * angle_N + g.layer(u_N2)[0].sum(axis=1)
    for i, arc in arcs(g, u_N2, angle_N).items():
        cost_N[i] = arc.cost(angle_N[i])[0]
    return cost_N


def plane_radii(
    d: int, r_N2: Float[np.ndarray, "N 2"], angle_N: Float[np.ndarray, " N"], t_NT: Float[np.ndarray, "N T"]
) -> Float[np.ndarray, "N T"]:
    """The radius where the path of each pair has swept fractions t of its angle."""
    g = radial(d)
    u_N2 = g.depth(r_N2)
    near_N = arcs(g, u_N2, angle_N)
    decay_NT, rise_NT = (np.exp(-g.kappa * part * angle_N[:, None]) for part in (t_NT, 1 - t_NT))
    Y_N2 = g.layer(u_N2)[1]
    Y_NT = Y_N2[:, :1] * decay_NT + Y_N2[:, 1:] * rise_NT
    Y_NT[list(near_N)] = 0
    u_NT = g.unlayer(Y_NT)
    for i, arc in near_N.items():
        first, second = np.abs(u_N2[i] * g.rise(u_N2[i])[0])
        u_NT[i] = g.sink(arc.at(t_NT[i] if first <= second else 1 - t_NT[i]))
    return g.best * (1 + u_NT)
