"""Text-to-image: a seed, a prompt, the sampler, the decoder.

Rombach et al., arXiv:2112.10752, drawn by `stages.sampling`. Deterministic: a seed and a prompt
give one image.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

from typing import Literal

import torch

from stages import registry
from stages.contract import Backbone, Generate, Generated, Models, Order
from stages.generate.settings import SamplerSettings
from stages.sampling import denoise


@registry.method("text_to_image")
class TextToImage(Generate):
    """Images of the prompt from seeds."""

    class Config(SamplerSettings):
        method: Literal["text_to_image"] = "text_to_image"

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        with torch.no_grad():
            z0_BCHW = denoise(backbone, order.z_BCHW, order.prompt, self.sampler())
            return Generated(backbone.decode(z0_BCHW).clamp(-1, 1))
