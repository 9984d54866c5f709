"""Redrawing an image: noise it up to a ratio r, and let the sampler draw the rest.

Meng et al. (SDEdit), arXiv:2108.01073; Luzi et al. (Boomerang), arXiv:2210.12100. With S sampling steps the
last ⌊r·S⌋ are made, from z = √ᾱ·z_0 + √(1−ᾱ)·n at the first of them (on a flow z = (1−σ)·z_0 + σ·n); at r = 1
from n itself, as the authors of GeNIe (arXiv:2312.02548) do.

Departures: their code noises up to timestep int(1000·r) and asks the model first at the scheduler's next one
below; here both are one timestep, so that the sampler starts at the noise level that it finds. DDIM unless
set, in place of DPM-Solver. z_0 is the VAE's posterior mean.

Several ratios go through the sampler together: a branch joins the batch at its first step. Every call of the
model then has all rows that are at that timestep: as many calls as the longest branch has steps.

Rows that have a ratio each go through it in a batch of one size (`redraw_rows`): a row that has not begun yet
rides along, and what the model says of it is thrown away. So it costs what the longest row of a batch costs,
and no row's bits depend on when its neighbours begin.

Shape letters: B batch, M ratios, C H W latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from stages.contract import Backbone, Facts, Generate, Generated, Models, Order, Sampler
from stages.generate.settings import SamplerSettings
from stages.sampling import Condition, add_noise, condition, denoise, path_of, steps_of


def redraw(
    backbone: Backbone,
    z0_BCHW: Float[Tensor, "B C H W"],
    noise_BCHW: Float[Tensor, "B C H W"],
    asked: Condition,
    sampler: Sampler,
    ratios: Sequence[float],
) -> Float[Tensor, "M B C H W"]:
    """Latents z_0 of the images as each ratio redraws them. A ratio of no whole step gives z_0 back."""
    levels = path_of(backbone, sampler).levels
    firsts = [sampler.steps - steps_of(ratio, sampler.steps) for ratio in ratios]
    done = {m: z0_BCHW for m, first in enumerate(firsts) if first == sampler.steps}
    running: list[int] = []  # branches in the batch
    z = z0_BCHW[:0]
    joins = sorted(set(firsts) - {sampler.steps})
    for first, last in pairwise([*joins, sampler.steps]):
        for m in (m for m, start in enumerate(firsts) if start == first):
            running.append(m)
            pure = ratios[m] == 1
            z = torch.cat([z, noise_BCHW if pure else add_noise(z0_BCHW, noise_BCHW, levels[first])])
        z = denoise(backbone, z, _repeated(asked, len(running)), sampler, first=first, last=last)
    done |= dict(zip(running, z.chunk(len(running)) if running else (), strict=True))
    return torch.stack([done[m] for m in range(len(ratios))])


def redraw_rows(
    backbone: Backbone,
    z0_BCHW: Float[Tensor, "B C H W"],
    noise_BCHW: Float[Tensor, "B C H W"],
    asked: Condition,
    sampler: Sampler,
    ratios: Sequence[float],
) -> Float[Tensor, "B C H W"]:
    """Latents z_0 of the images, each row as its own ratio redraws it. No whole step gives z_0 back."""
    levels = path_of(backbone, sampler).levels
    firsts = [sampler.steps - steps_of(ratio, sampler.steps) for ratio in ratios]
    # in the memory layout of noise, whatever the VAE's is: kernels, and with them bits, depend on it
    z_BCHW = z0_BCHW.clone(memory_format=torch.contiguous_format)
    for first, last in pairwise(sorted({*firsts, sampler.steps})):
        rows = [row for row, start in enumerate(firsts) if start == first]
        pure = first == 0  # of r = 1 alone
        z_BCHW[rows] = noise_BCHW[rows] if pure else add_noise(z0_BCHW[rows], noise_BCHW[rows], levels[first])
        drawn_BCHW = denoise(backbone, z_BCHW, asked, sampler, first=first, last=last)
        begun_B = torch.tensor([start <= first for start in firsts], device=z_BCHW.device)
        z_BCHW = torch.where(begun_B[:, None, None, None], drawn_BCHW, z_BCHW)
    return z_BCHW


def _repeated(asked: Condition, times: int) -> Condition:
    return Condition(asked.text.repeat(times), asked.negative.repeat(times), asked.guidance)


class RedrawSettings(SamplerSettings):
    """Of methods that redraw images."""

    steps: int = Field(50, ge=1)
    """Steps of the whole sampler, of which a share r is made; 50 in GeNIe."""
    guidance: float = Field(7.5, ge=0)
    """Scale of classifier-free guidance; 7.5 in GeNIe."""


class Redraw(Generate):
    """A method that redraws each row's image at a ratio: what it adds is which images, and which ratio."""

    @abstractmethod
    def ratios(self) -> Sequence[float]:
        """The noise ratios that may be used."""

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        if self.sampler().scheduler == "dpm_solver++" and len(self.ratios()) > 1:
            raise UserError(
                f"generate: {self.name} draws several ratios in one batch, and dpm_solver++ remembers the"
                " step before, which a ratio that joins does not have; give scheduler ddim or euler"
            )
        for ratio in self.ratios():
            if steps_of(ratio, self.config.steps) == 0:
                raise UserError(
                    f"generate: noise ratio {ratio} of {self.config.steps} steps makes none, and the image"
                    f" would come back as it is; give at least {1 / self.config.steps:.2g}, or more steps"
                )

    def asked(self, backbone: Backbone, order: Order) -> tuple[Sequence[str], Condition]:
        """The prompt of each row, and the condition of the batch."""
        batch = len(order.z_BCHW)
        return [order.prompt] * batch, condition(backbone, order.prompt, self.config.guidance, batch)

    def encoded(self, backbone: Backbone, order: Order) -> Float[Tensor, "B C H W"]:
        """Latents of the images that the rows start from."""
        assert order.source_B3hw is not None, f"{self.name} starts from images"
        return backbone.encode(order.source_B3hw)

    def redrawn(self, backbone: Backbone, order: Order, ratios: Sequence[float]) -> Generated:
        """Each row's image at the row's ratio."""
        with torch.no_grad():
            z0_BCHW = self.encoded(backbone, order)
            prompts, asked = self.asked(backbone, order)
            z_BCHW = redraw_rows(backbone, z0_BCHW, order.z_BCHW, asked, self.sampler(), ratios)
            image_B3hw = backbone.decode(z_BCHW).clamp(-1, 1)
        return Generated(image_B3hw, prompts=prompts, noise_ratios=ratios)


class FixedRedraw(Redraw):
    """A redraw at the one ratio of the settings."""

    def ratios(self) -> Sequence[float]:
        return (self.config.ratio,)

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        return self.redrawn(backbone, order, [self.config.ratio] * len(order.z_BCHW))
