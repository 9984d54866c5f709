"""The middle of a group of directions on the sphere: minimise Σ w_k θ_k^p, θ_k the angle to seed k.

p = 2 is the Karcher mean, p = 1 the geometric median. A minimiser lies in the span of the seeds (a reflection
that fixes the span leaves the cost as it is, and the cost is convex around it), so everything is done in the
K coordinates that the seeds' cosines give, whatever d is.

Newton's method on the sphere. With the unit tangents e_k at c towards seed k, for p = 1, 2,
    gradient  −Σ w_k θ_k^(p−1) e_k,
    Hessian   Σ w_k [(p−1)·e_k e_kᵀ + θ_k^(p−1)·cot θ_k·(I − ccᵀ − e_k e_kᵀ)].

Shape letters: *B any batch, N rows of it, K seeds and as many coordinates.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from stages.combine.latents import norms, weighted_sum

ROUNDING = 1e-14  # of the largest eigenvalue of the cosines: below, rounding of seeds that are dependent
COINCIDENT = 1e-7  # radians: a smaller angle between seeds is what ROUNDING leaves of none
TOLERANCE = 1e-12  # of the gradient, whose terms are of the order of 1
NEWTON, HALVINGS = 60, 40  # at most; three to six steps and no halving are usual


class Span(NamedTuple):
    """A group of directions, in coordinates of their span."""

    u: Float[Tensor, "*B K C H W"]  # the directions as latents of norm 1, float64
    p: Float[Tensor, "*B K K"]  # their coordinates, a row each, of norm 1
    back: Float[Tensor, "*B K K"]  # coordinates → weights of the directions

    def latent(self, c: Float[Tensor, "*B K"]) -> Float[Tensor, "*B C H W"]:
        """The direction with coordinates c."""
        return weighted_sum(self.u, (self.back @ c[..., None])[..., 0])


def span(z: Float[Tensor, "*B K C H W"]) -> Span:
    """Coordinates with the seeds' cosines as inner products: UUᵀ = VΛVᵀ, p = VΛ^{1/2}."""
    length = norms(z)
    if not bool((length > 0).all()):
        raise ValueError("a seed of norm 0 has no direction")
    u = z / length
    flat = u.flatten(-3)
    eigenvalues, vectors = torch.linalg.eigh(flat @ flat.mT)
    kept = eigenvalues > ROUNDING * eigenvalues[..., -1:]
    root = torch.where(kept, eigenvalues, 0.0).sqrt()[..., None, :]
    return Span(u, vectors * root, torch.where(kept[..., None, :], vectors / root, 0.0))


def require_hemisphere(p: Float[Tensor, "*B K K"], w: Float[Tensor, "*B K"]) -> None:
    """Refuse groups that are spread so far that they may have several middles, or none."""
    used = (w > 0).double()
    towards_mean = p @ (used[..., None, :] @ p).mT
    if not bool(((towards_mean[..., 0] > 0) | (used == 0)).all()):
        raise ValueError(
            "a group with a seed 90° or more from its mean direction may have several middles, or none;"
            " leave out the seeds that are opposite to the others"
        )


def angles(
    p: Float[Tensor, "*#B K K"], c: Float[Tensor, "*#B K"]
) -> tuple[Float[Tensor, "*B K"], Float[Tensor, "*B K K"]]:
    """θ from c to each direction, and unit tangents e at c towards them; 0 for c itself."""
    cosine = (p @ c[..., None])[..., 0]
    across = p - cosine[..., None] * c[..., None, :]
    sine = across.norm(dim=-1)
    return torch.atan2(sine, cosine), across / torch.where(sine > 0, sine, 1.0)[..., None]


def cost(
    p: Float[Tensor, "*#B K K"], w: Float[Tensor, "*#B K"], c: Float[Tensor, "*#B K"], power: Literal[1, 2]
) -> Float[Tensor, "*B"]:
    """Σ w_k θ_k^p / p."""
    return (w * angles(p, c)[0].pow(power)).sum(dim=-1) / power


def minimise(
    p_NKK: Float[Tensor, "N K K"], w_NK: Float[Tensor, "N K"], power: Literal[1, 2]
) -> Float[Tensor, "N K"]:
    """Newton's method from the normalised mean, each row until its gradient vanishes.

    Eigenvalues of the Hessian are taken by their size and never below the gradient's, so that a step always
    goes down and no further than 1 rad; it is halved until the cost falls (Armijo).
    """
    c_NK = _unit((w_NK[:, None, :] @ p_NKK)[:, 0])
    for _ in range(NEWTON):
        gradient_NK, hessian_NKK = _derivatives(p_NKK, w_NK, c_NK, power)
        size_N1 = gradient_NK.norm(dim=-1, keepdim=True)
        going_N = size_N1[:, 0] > TOLERANCE
        if not bool(going_N.any()):
            break
        curvatures_NK, vectors_NKK = torch.linalg.eigh(hessian_NKK)
        slopes_NK = (gradient_NK[:, None, :] @ vectors_NKK)[:, 0]
        damped_NK = slopes_NK / torch.maximum(curvatures_NK.abs(), size_N1).clamp(min=TOLERANCE)
        step_NK = -(vectors_NKK @ damped_NK[..., None])[..., 0]
        c_NK = torch.where(going_N[:, None], _walk(p_NKK, w_NK, c_NK, step_NK, gradient_NK, power), c_NK)
    return c_NK


def _derivatives(p_NKK: Tensor, w_NK: Tensor, c_NK: Tensor, power: Literal[1, 2]) -> tuple[Tensor, Tensor]:
    theta_NK, e_NKK = angles(p_NKK, c_NK)
    theta_NK = theta_NK.clamp(min=TOLERANCE)  # θ·cot θ → 1
    slope_NK = w_NK * theta_NK.pow(power - 1)
    radial_NK = w_NK * (power - 1)
    bent_NK = slope_NK / theta_NK.tan()
    tangent_NKK = torch.eye(c_NK.shape[-1]).to(c_NK) - c_NK[:, :, None] * c_NK[:, None, :]
    hessian_NKK = bent_NK.sum(dim=-1)[:, None, None] * tangent_NKK
    hessian_NKK = hessian_NKK + e_NKK.mT @ ((radial_NK - bent_NK)[..., None] * e_NKK)
    return -(slope_NK[:, None, :] @ e_NKK)[:, 0], hessian_NKK


def _walk(
    p_NKK: Tensor, w_NK: Tensor, c_NK: Tensor, step_NK: Tensor, gradient_NK: Tensor, power: Literal[1, 2]
) -> Tensor:
    """From c along the great circle of the step, as far as the cost falls."""
    before_N = cost(p_NKK, w_NK, c_NK, power)
    fall_N = (gradient_NK * step_NK).sum(dim=-1)
    rounding_N = 4 * torch.finfo(torch.float64).eps * before_N
    share_N1 = torch.ones_like(c_NK[:, :1])
    for _ in range(HALVINGS):
        arrived_NK = _along(c_NK, share_N1 * step_NK)
        short_N = (
            cost(p_NKK, w_NK, arrived_NK, power) <= before_N + 1e-4 * share_N1[:, 0] * fall_N + rounding_N
        )
        if bool(short_N.all()):
            break
        share_N1 = torch.where(short_N[:, None], share_N1, share_N1 / 2)
    return arrived_NK


def _along(c_NK: Tensor, step_NK: Tensor) -> Tensor:
    """The exponential map."""
    length_N1 = step_NK.norm(dim=-1, keepdim=True)
    return _unit(length_N1.cos() * c_NK + torch.sinc(length_N1 / torch.pi) * step_NK)


def _unit(c: Tensor) -> Tensor:
    return c / c.norm(dim=-1, keepdim=True)
