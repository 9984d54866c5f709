"""Text-to-image: a seed, a prompt, the sampler, the decoder.

Rombach et al., arXiv:2112.10752, drawn with DDIM (see `stages.sampling`). Deterministic: a seed and a prompt
give one image.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Generate, Generated, Models, Order, Sampler
from stages.sampling import denoise


@registry.method("text_to_image")
class TextToImage(Generate):
    """Images of the prompt from seeds."""

    class Config(Settings):
        method: Literal["text_to_image"] = "text_to_image"
        steps: int = Field(20, ge=1)
        """DDIM steps; SeedSelect's and NAO's code draw with 20."""
        guidance: float = Field(4.0, ge=0)
        """Scale of classifier-free guidance. 1 is none, at half the work; Stable Diffusion is used at 7.5."""

    def sampler(self) -> Sampler:
        return Sampler(self.config.steps, self.config.guidance)

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        with torch.no_grad():
            z0_BCHW = denoise(backbone, order.z_BCHW, order.prompt, self.sampler())
            return Generated(backbone.decode(z0_BCHW).clamp(-1, 1))
