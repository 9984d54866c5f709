"""SeedSelect: move the seed until its image is close to the references, in CLIP and in the VAE.

Samuel et al., arXiv:2304.14530, with the constants of the authors' code. Only z_T is optimised; the loss and
its gradients are in `stages.refine.seed_loss`. c is the mean of the references' unnormalised CLIP features,
v̄ the mean of their latents.

Published settings, both with the exact gradient through 20 steps and without views, noise or a stop rule:

| | iterations | lr | generate.guidance |
|---|---|---|---|
| SeedSelect | 30 | 0.1 | 7.5 |
| NAO (NeurIPS 2023) | 5 | 0.05 | 1 |

Departures: v̄ is the mean of posterior means, not of samples, so that an artifact has one value. Generated
images and references go through the same antialiased resize and crop. Defaults are NAO's short form with the
build's own guidance. The published code lets the norm of z_T go where it goes; `norm: keep` puts each row
back on its sphere after every step. And a row is moved only if that helped: where the loss of the moved seed,
by the whole sampler and of the picture itself, is above that of the seed that came, the seed stays the one
that came, unless the classifier of the stop rule recognised its picture. The published code keeps whatever
came out last.

Shape letters: B batch, N references, C H W latent, h w image, E CLIP features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Material, Models, Order, Refine, Refined, Sampler
from stages.memory import Memory
from stages.refine.seed_loss import OMEGA, Likeness, drawn, loss_of, predicted
from stages.refine.stop import Plateau, Recognised, Stop
from stages.refine.views import draw_views
from stages.sampling import condition, denoise

GRADIENT_STEPS = {"one_step": 1, "truncated": 3}  # unless set


def descend(
    start_BCHW: Float[Tensor, "B C H W"],
    followed: Callable[[Tensor], tuple[Tensor, Tensor]],
    finished: Callable[[Tensor, Tensor, list[list[float]]], list[bool]],
    *,
    iterations: int,
    lr: float,
    decay_from: int,
    keep_norm: bool,
) -> tuple[Float[Tensor, "B C H W"], list[list[float]], Bool[Tensor, " B"]]:
    """AdamW on each row until it is finished, the losses that it followed while it ran, and who finished.

    `followed` gives the loss of each row, and latents that `finished` may look at beside seeds and losses.
    Every update is elementwise, so no row sees another. A finished row stays in the batch and moves no more.
    """
    losses: list[list[float]] = [[] for _ in start_BCHW]
    running_B = torch.ones(len(start_BCHW), dtype=torch.bool, device=start_BCHW.device)
    with torch.enable_grad():
        z = start_BCHW.clone().requires_grad_()
        optimizer = torch.optim.AdamW([z], lr=lr, weight_decay=0.01)
        for iteration in range(iterations):
            if iteration == decay_from:
                optimizer.param_groups[0]["lr"] = lr / 10
            loss_B, latents = followed(z)
            (z.grad,) = torch.autograd.grad(loss_B.sum(), z)
            for row, loss, running in zip(losses, loss_B.tolist(), running_B.tolist(), strict=True):
                row += [loss] if running else []
            with torch.no_grad():
                running_B &= ~torch.tensor(finished(z, latents, losses), device=z.device)
                if not running_B.any():
                    break
                before_BCHW = z.clone()
                optimizer.step()
                if keep_norm:
                    z *= _norm(start_BCHW) / _norm(z)
                z.copy_(torch.where(running_B[:, None, None, None], z, before_BCHW))
    return z.detach(), losses, ~running_B


def _norm(z_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 1 1"]:
    return z_BCHW.flatten(1).norm(dim=1)[:, None, None, None]


@registry.method("seedselect")
class SeedSelect(Refine):
    """Seeds whose pictures are closer to the references.

    A row's losses are that of its seed as it came, by the whole sampler; then that which each of its
    iterations followed, by the chosen gradient and views; then that of the moved seed, again by the whole
    sampler. Where the last is above the first, the seed that came was kept, but for one that was recognised.
    """

    version = 2

    class Config(Settings):
        method: Literal["seedselect"] = "seedselect"
        clip: str = "tangram"
        """CLIP model of the semantic loss: tangram, a folder, hf-hub:owner/name, open_clip's
        ARCHITECTURE/WEIGHTS, or package.module:Class."""
        iterations: int = Field(5, ge=1)
        """Gradient steps, at most: 5 in NAO, 30 in SeedSelect."""
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
        gradient: Literal["exact", "one_step", "truncated"] = "exact"
        """exact: through all sampling steps, as published; truncated: through the last ones, the first taken
        as the identity; one_step: of the image predicted by one model call, or few. See `seed_loss`."""
        gradient_steps: int | None = Field(None, ge=1)
        """Sampling steps of truncated (3 unless set: all that the loss looks at), calls of one_step (1)."""
        views: int = Field(1, ge=1)
        """Views in which CLIP sees each image: itself, and crops. 1, the image alone, is as published."""
        noise: float = Field(0.0, ge=0)
        """Standard deviation of the noise in each view, on the scale [-1, 1]. 0 is as published."""
        stop: Stop | None = None
        """When a row stops early, and its seed moves no more; none, as published: never."""

        @model_validator(mode="after")
        def _steps_are_used(self) -> SeedSelect.Config:
            if self.gradient == "exact" and self.gradient_steps is not None:
                raise PydanticCustomError(
                    "said", "gradient_steps belongs to gradient one_step or truncated: leave it out"
                )
            return self

    def models(self) -> Mapping[str, str]:
        stop = self.config.stop
        scorer = {"classifier": stop.classifier} if isinstance(stop, Recognised) else {}
        return {"clip": self.config.clip, **scorer}

    def check(self, sampler: Sampler, models: Models, target: str) -> None:
        if sampler.steps < len(OMEGA):
            raise UserError(
                f"seedselect looks at the last {len(OMEGA)} sampling steps, generate has {sampler.steps}: "
                f"set generate.steps to at least {len(OMEGA)}"
            )
        if (steps := self._gradient_steps(sampler)) > sampler.steps:
            raise UserError(
                f"seedselect's gradient_steps is {steps}, generate has {sampler.steps} steps: "
                f"set gradient_steps to at most {sampler.steps}"
            )
        if isinstance(self.config.stop, Recognised):
            self.config.stop.check(models, target)

    def prepared(self) -> Mapping[str, Any]:
        return {"clip_and_latent": self.version}

    def prepare(self, backbone: Backbone, models: Models, material: Material) -> dict[str, Tensor]:
        """c and v̄. One reference at a time: neither memory nor bits depend on how many there are."""
        image_N3hw = material.image_N3hw
        clip = models.clip(self.config.clip)
        with torch.no_grad():
            clip_NE = torch.cat([clip.encode_image(image_3hw[None]) for image_3hw in image_N3hw])
            latent_NCHW = torch.cat([backbone.encode(image_3hw[None]) for image_3hw in image_N3hw])
            return {
                "clip_E": F.normalize(clip_NE.double().mean(dim=0), dim=0).to(clip_NE.dtype),
                "latent_CHW": latent_NCHW.double().mean(dim=0).to(latent_NCHW.dtype),
            }

    def __call__(self, backbone: Backbone, models: Models, order: Order, sampler: Sampler) -> Refined:
        self.check(sampler, models, order.target)
        config, start_BCHW = self.config, order.z_BCHW.detach()
        asked = condition(backbone, order.prompt, sampler.guidance, len(start_BCHW))
        clip_E, latent_CHW = (order.artifact[key].to(start_BCHW.device) for key in ("clip_E", "latent_CHW"))
        weights = {"semantic": config.semantic, "appearance": config.appearance}
        like = Likeness(models.clip(config.clip), clip_E, latent_CHW, **weights)
        streams = [chance.own() for chance in order.chances]
        memory = Memory.spare(start_BCHW.device)

        def whole(z_BCHW: Tensor) -> Tensor:
            with torch.no_grad():
                return loss_of(backbone, drawn(backbone, z_BCHW, asked, sampler, sampler.steps), like)

        def followed(z_BCHW: Tensor) -> tuple[Tensor, Tensor]:
            memory.begin()
            steps = self._gradient_steps(sampler)
            if config.gradient == "one_step":
                latents = [predicted(backbone, z_BCHW, asked, sampler, steps, memory=memory)]
            else:
                latents = drawn(backbone, z_BCHW, asked, sampler, steps, memory=memory)
            views = draw_views(streams, config.views, config.noise, backbone.image_size, z_BCHW)
            return loss_of(backbone, latents, like, views, memory=memory), latents[-1]

        def finished(z_BCHW: Tensor, z0_BCHW: Tensor, losses: list[list[float]]) -> list[bool]:
            if isinstance(config.stop, Plateau):
                return [config.stop.reached(row) for row in losses]
            if isinstance(config.stop, Recognised):
                if config.gradient == "one_step":  # z0 is a prediction: the rule is about the picture
                    z0_BCHW = denoise(backbone, z_BCHW, asked, sampler)
                return config.stop.reached(models, order.target, backbone.decode(z0_BCHW))
            return [False] * len(losses)

        moved_BCHW, losses, finished_B = descend(
            start_BCHW,
            followed,
            finished,
            iterations=config.iterations,
            lr=config.lr,
            decay_from=config.decay_from,
            keep_norm=config.norm == "keep",
        )
        after_B = whole(moved_BCHW)
        if config.gradient == "one_step" or config.views > 1 or config.noise > 0:
            before_B = whole(start_BCHW)
        else:  # the loss that was followed first
            before_B = after_B.new_tensor([row[0] for row in losses])
        helped_B = after_B <= before_B  # never where it is not a number
        if isinstance(config.stop, Recognised):  # its word counts for more than the loss
            helped_B |= finished_B
        return Refined(
            torch.where(helped_B[:, None, None, None], moved_BCHW, start_BCHW),
            [[b, *row, a] for b, row, a in zip(before_B.tolist(), losses, after_B.tolist(), strict=True)],
        )

    def _gradient_steps(self, sampler: Sampler) -> int:
        return self.config.gradient_steps or GRADIENT_STEPS.get(self.config.gradient, sampler.steps)
