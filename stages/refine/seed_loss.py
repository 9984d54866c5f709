"""SeedSelect's loss of a seed, and the ways to its gradient.

Samuel et al., arXiv:2304.14530, with the constants of the authors' code:

    L = 10·Σ_j ω_j·(1 − cos(CLIP(decode z_j), c)) + mean((z_0 − v̄)²),   ω = (0.05, 0.25, 0.7)

over the latents z_j after the last three sampling steps (z_j itself is decoded, not x̂0). c and v̄ stand for
the references. What the latents are a function of, and so the gradient with respect to z_T, is chosen:

- `drawn` with all n steps: the published loss and its exact gradient. Checkpointing keeps its memory at one
  step's.
- `drawn` with k < n steps: the same value, but the Jacobian of the first n − k steps is taken as the identity
  (straight-through: z_{T−(n−k)} as a value, z_T as what it is differentiated by). For a model that predicts
  ε, Eq. 12 of DDIM has the Jacobian √(ᾱ'/ᾱ)·I where the network's own derivative is left out, which is a
  multiple of it, and AdamW's step does not depend on multiples. What is lost is how the network turns z_T
  into layout. Of the last three latents, those before the last k steps add to the value and nothing to the
  gradient.
- `predicted` after k model calls: another loss, of x̂0 alone (ω = 1, and x̂0 in place of z_0), with its exact
  gradient. The calls are at timesteps of the sampler's own path, the first at its beginning: DDIM steps from
  each to the next, and x̂0 at the last. One call is the one-step prediction from z_T: a blurred mean of what
  the sampler might draw.

Shape letters: B batch, C H W latent, h w image, E CLIP features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from stages.contract import Backbone, ClipModel, Sampler
from stages.refine.views import ITSELF, View
from stages.sampling import Condition, ddim_step, denoise, path_of, predict_guided, to_x0

OMEGA = (0.05, 0.25, 0.7)  # weights of the last three latents


@dataclass(frozen=True)
class Likeness:
    """What pictures are to be like, and how much each kind of likeness counts."""

    clip: ClipModel
    clip_E: Float[Tensor, " E"]
    latent_CHW: Float[Tensor, "C H W"]
    semantic: float
    appearance: float


def drawn(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    asked: Condition,
    sampler: Sampler,
    steps: int,
    *,
    checkpoint: bool = True,
) -> list[Float[Tensor, "B C H W"]]:
    """The latents after the sampler's last three steps. The gradient goes through its last `steps` steps."""
    first, latents = sampler.steps - steps, list[Tensor]()

    def keep(k: int, z_BCHW: Tensor) -> None:
        latents.append(z_BCHW)

    with torch.no_grad():
        early_BCHW = denoise(backbone, z_BCHW.detach(), asked, sampler, last=first, callback=keep)
    # the second term is 0, and what is differentiated
    straight_BCHW = early_BCHW + (z_BCHW - z_BCHW.detach())
    denoise(backbone, straight_BCHW, asked, sampler, first=first, callback=keep, checkpoint=checkpoint)
    return latents[-len(OMEGA) :]


def predicted(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    asked: Condition,
    sampler: Sampler,
    calls: int,
    *,
    checkpoint: bool = True,
) -> Float[Tensor, "B C H W"]:
    """x̂0 at the last of `calls` timesteps, evenly spread over the sampler's path from its beginning."""
    path, kind = path_of(backbone, sampler), backbone.schedule.prediction
    z_BCHW = path.start * z_BCHW
    places = [call * sampler.steps // calls for call in range(calls)]
    for place, following in zip(places, [*places[1:], None], strict=True):

        def step(z_BCHW: Tensor, place: int = place, following: int | None = following) -> Tensor:
            output_BCHW = predict_guided(backbone, z_BCHW, path.times[place], asked)
            if following is None:
                return to_x0(z_BCHW, output_BCHW, path.levels[place], kind)
            return ddim_step(z_BCHW, output_BCHW, path.levels[place], path.levels[following], kind)

        z_BCHW = recompute(step, z_BCHW, use_reentrant=False) if checkpoint else step(z_BCHW)
    return z_BCHW


def loss_of(
    backbone: Backbone,
    latents: Sequence[Float[Tensor, "B C H W"]],
    like: Likeness,
    views: Sequence[View] = ITSELF,
    *,
    checkpoint: bool = True,
) -> Float[Tensor, " B"]:
    """The loss of each row, its semantic part the mean over the views of each decoded latent.

    `latents` are the last three of the sampler, or the one that is all there is. Rows do not mix, so the
    gradient of the sum holds each row's own gradient.
    """

    def distance(z_BCHW: Tensor) -> Tensor:
        image_B3hw = backbone.decode(z_BCHW)
        distances = [
            1 - F.cosine_similarity(like.clip.encode_image(view(image_B3hw)), like.clip_E[None], dim=1)
            for view in views
        ]
        return torch.stack(distances).mean(dim=0)

    loss_B = like.appearance * (latents[-1] - like.latent_CHW).square().mean(dim=(1, 2, 3))
    for omega, z_j in zip(OMEGA if len(latents) > 1 else (1.0,), latents, strict=True):
        distance_B = recompute(distance, z_j, use_reentrant=False) if checkpoint else distance(z_j)
        loss_B = loss_B + like.semantic * omega * distance_B
    return loss_B
