"""SeedSelect: move the seed until its image is close to the references, in CLIP and in the VAE.

Samuel et al., arXiv:2304.14530, with the constants of the authors' code. Only z_T is optimised:

    L = 10·Σ_j ω_j·(1 − cos(CLIP(decode z_j), c)) + mean((z_0 − v̄)²),   ω = (0.05, 0.25, 0.7)

over the latents z_j after the last three sampling steps (z_j itself is decoded, not x̂0). c is the mean of the
references' unnormalised CLIP features, v̄ the mean of their latents. The gradient goes through every
sampling step; checkpointing keeps its memory at one step's.

Departures: v̄ is the mean of posterior means, not of samples, so that an artifact has one value. Generated
images and references go through the same antialiased resize and crop. The default is NAO's short form (5
iterations at 0.05) with the build's own guidance; the paper's is 30 iterations at 0.1 with 7.5. The published
code lets the norm of z_T go where it goes; `norm: keep` puts each row back on its sphere after every step.

Shape letters: B batch, N references, C H W latent, h w image, E CLIP features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, ClipModel, Models, Refine, Refined, Sampler
from stages.sampling import denoise

OMEGA = (0.05, 0.25, 0.7)  # weights of the last three latents


def seed_loss(
    backbone: Backbone,
    clip: ClipModel,
    z_BCHW: Float[Tensor, "B C H W"],
    prompt: str,
    sampler: Sampler,
    clip_E: Float[Tensor, " E"],
    latent_CHW: Float[Tensor, "C H W"],
    *,
    semantic: float,
    appearance: float,
    checkpoint: bool = True,
) -> Float[Tensor, " B"]:
    """The loss of each row. Rows do not mix, so the gradient of the sum holds each row's own gradient."""

    def distance(z_BCHW: Tensor) -> Tensor:
        features_BE = clip.encode_image(backbone.decode(z_BCHW))
        return 1 - F.cosine_similarity(features_BE, clip_E[None], dim=1)

    latents: list[Tensor] = []
    z0_BCHW = denoise(
        backbone, z_BCHW, prompt, sampler, callback=lambda k, z: latents.append(z), checkpoint=checkpoint
    )
    loss_B = appearance * (z0_BCHW - latent_CHW).square().mean(dim=(1, 2, 3))
    for omega, z_j in zip(OMEGA, latents[-len(OMEGA) :], strict=True):
        distance_B = recompute(distance, z_j, use_reentrant=False) if checkpoint else distance(z_j)
        loss_B = loss_B + semantic * omega * distance_B
    return loss_B


@registry.method("seedselect")
class SeedSelect(Refine):
    """AdamW on the seeds of a batch; every update is elementwise, so no row sees another."""

    class Config(Settings):
        method: Literal["seedselect"] = "seedselect"
        clip: str = "tangram"
        """CLIP model of the semantic loss: tangram, local-dir:FOLDER, ARCHITECTURE/WEIGHTS."""
        iterations: int = Field(5, ge=1)
        """Gradient steps: 5 in NAO, 30 in SeedSelect."""
        lr: float = Field(0.05, gt=0)
        """AdamW's, about the change of each coordinate in the first step. NAO 0.05, SeedSelect 0.1."""
        decay_from: int = Field(3, ge=1)
        """The iteration, counted from 0, from which on the learning rate is a tenth (authors' code)."""
        semantic: float = Field(10.0, ge=0)
        """Weight of the CLIP loss (authors' code)."""
        appearance: float = Field(1.0, ge=0)
        """Weight of the latent loss (authors' code)."""
        norm: Literal["free", "keep"] = "free"
        """free: as published; keep: after each step a seed is scaled back to the norm that it came with."""

    def models(self) -> Mapping[str, str]:
        return {"clip": self.config.clip}

    def check(self, sampler: Sampler) -> None:
        if sampler.steps < len(OMEGA):
            raise UserError(
                f"seedselect looks at the last {len(OMEGA)} sampling steps, generate has {sampler.steps}: "
                f"set generate.steps to at least {len(OMEGA)}"
            )

    def prepare(
        self, backbone: Backbone, models: Models, image_N3hw: Float[Tensor, "N 3 h w"]
    ) -> dict[str, Tensor]:
        """c and v̄. One reference at a time: neither memory nor bits depend on how many there are."""
        clip = models.clip(self.config.clip)
        with torch.no_grad():
            clip_NE = torch.cat([clip.encode_image(image_3hw[None]) for image_3hw in image_N3hw])
            latent_NCHW = torch.cat([backbone.encode(image_3hw[None]) for image_3hw in image_N3hw])
            return {
                "clip_E": F.normalize(clip_NE.double().mean(dim=0), dim=0).to(clip_NE.dtype),
                "latent_CHW": latent_NCHW.double().mean(dim=0).to(latent_NCHW.dtype),
            }

    def __call__(
        self,
        backbone: Backbone,
        models: Models,
        z_BCHW: Float[Tensor, "B C H W"],
        prompt: str,
        sampler: Sampler,
        artifact: Mapping[str, Tensor],
    ) -> Refined:
        self.check(sampler)
        config, clip = self.config, models.clip(self.config.clip)
        clip_E, latent_CHW = (artifact[key].to(z_BCHW.device) for key in ("clip_E", "latent_CHW"))

        def loss_of(z_BCHW: Tensor) -> Tensor:
            weights = {"semantic": config.semantic, "appearance": config.appearance}
            return seed_loss(backbone, clip, z_BCHW, prompt, sampler, clip_E, latent_CHW, **weights)

        norm_B111 = z_BCHW.flatten(1).norm(dim=1)[:, None, None, None]
        history = []
        with torch.enable_grad():
            z = z_BCHW.detach().clone().requires_grad_()
            optimizer = torch.optim.AdamW([z], lr=config.lr, weight_decay=0.01)
            for iteration in range(config.iterations):
                if iteration == config.decay_from:
                    optimizer.param_groups[0]["lr"] = config.lr / 10
                loss_B = loss_of(z)
                (z.grad,) = torch.autograd.grad(loss_B.sum(), z)
                optimizer.step()
                if config.norm == "keep":
                    with torch.no_grad():
                        z.mul_(norm_B111 / z.flatten(1).norm(dim=1)[:, None, None, None])
                history.append(loss_B.detach())
        with torch.no_grad():
            history.append(loss_of(z))
        return Refined(z.detach(), torch.stack(history, dim=1).tolist())
