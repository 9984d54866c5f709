"""SeedSelect's loss of a seed, and the ways to its gradient.

Samuel et al., arXiv:2304.14530, with the constants of the authors' code:

    L = 10·Σ_j ω_j·(1 − cos(CLIP(decode z_j), c)) + mean((z_0 − v̄)²),   ω = (0.05, 0.25, 0.7)

over the latents z_j after the last three sampling steps (z_j itself is decoded, not x̂0). c and v̄ stand for
the references. What the latents are a function of, and so the gradient with respect to z_T, is chosen:

- `drawn` with all n steps: the published loss and its exact gradient, in as little as the memory of one step
  (`stages.memory`).
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

from stages.backbones.diffusion.model import slice_of
from stages.contract import Backbone, ClipModel, Sampler
from stages.memory import NOTHING, Memory
from stages.refine.views import ITSELF, View
from stages.sampling import Condition, ddim_step, denoise, path_of, predict_guided, to_x0

OMEGA = (0.05, 0.25, 0.7)  # weights of the last three latents

# Pixels that are decoded and looked at together: four images of 512 x 512. Decoding keeps more for a gradient
# than any other step, some 3 GB of such an image.
LOSS_PIXELS = 4 * 512 * 512


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
    memory: Memory = NOTHING,
) -> list[Float[Tensor, "B C H W"]]:
    """The latents after the sampler's last three steps. The gradient goes through its last `steps` steps."""
    first, latents = sampler.steps - steps, list[Tensor]()

    def keep(k: int, z_BCHW: Tensor) -> None:
        latents.append(z_BCHW)

    with torch.no_grad():
        early_BCHW = denoise(backbone, z_BCHW.detach(), asked, sampler, last=first, callback=keep)
    # the second term is 0, and what is differentiated
    straight_BCHW = early_BCHW + (z_BCHW - z_BCHW.detach())
    denoise(backbone, straight_BCHW, asked, sampler, first=first, callback=keep, memory=memory)
    return latents[-len(OMEGA) :]


def predicted(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    asked: Condition,
    sampler: Sampler,
    calls: int,
    *,
    memory: Memory = NOTHING,
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

        z_BCHW = memory.run(step, z_BCHW)
    return z_BCHW


def loss_of(
    backbone: Backbone,
    latents: Sequence[Float[Tensor, "B C H W"]],
    like: Likeness,
    views: Sequence[View] = ITSELF,
    *,
    memory: Memory = NOTHING,
) -> Float[Tensor, " B"]:
    """The loss of each row, its semantic part the mean over the views of each decoded latent.

    `latents` are the last three of the sampler, or the one that is all there is. Rows do not mix, so the
    gradient of the sum holds each row's own gradient, and they are decoded and looked at in slices.
    """
    batch = len(latents[-1])
    rows = slice_of(batch, LOSS_PIXELS // backbone.image_size**2)
    slices = [slice(start, start + rows) for start in range(0, batch, rows)]

    def distance(image_B3hw: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(like.clip.encode_image(image_B3hw), like.clip_E[None], dim=1)

    loss_B = like.appearance * (latents[-1] - like.latent_CHW).square().mean(dim=(1, 2, 3))
    for omega, z_j in zip(OMEGA if len(latents) > 1 else (1.0,), latents, strict=True):
        distances = []
        for few in slices:
            image_B3hw = memory.run(backbone.decode, z_j[few])
            seen = [memory.run(distance, view.of(few)(image_B3hw)) for view in views]
            distances.append(torch.stack(seen).mean(dim=0))
        loss_B = loss_B + like.semantic * omega * torch.cat(distances)
    return loss_B
