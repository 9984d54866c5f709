"""Null-prompted DDIM: guidance away from a negative prompt instead of away from no words.

The baseline "DDIM + null" of Um & Ye, arXiv:2410.07838, Table 1: the unconditional half of classifier-free
guidance reads "commonly-looking", and nothing else changes,

    ε̃ = ε_neg + g·(ε_c − ε_neg).

With g = 1 the negative prompt cancels, so that scale is refused. The paper's "+ null" row of SDXL-Lightning,
which is drawn with g = 1, is therefore the row above it but for rounding.

Shape letters: B batch, C H W latent.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from schemas.errors import UserError
from stages import registry
from stages.contract import Backbone, Facts, Generate, Generated, Models, Need, Order
from stages.generate.settings import SamplerSettings
from stages.sampling import condition, denoise


@registry.method("null_prompt")
class NullPrompt(Generate):
    """Images of the prompt from seeds, away from another prompt."""

    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    class Config(SamplerSettings):
        method: Literal["null_prompt"] = "null_prompt"
        steps: int = Field(20, ge=1)
        """Sampler steps, as in text_to_image; the paper draws with 50."""
        guidance: float = Field(4.0, ge=0)
        """Scale of classifier-free guidance, as in text_to_image; not 1. The paper uses 7.5."""
        negative: str = Field("commonly-looking", min_length=1)
        """The prompt to stay away from (paper's)."""

        @field_validator("guidance")
        @classmethod
        def _negative_counts(cls, guidance: float) -> float:
            if guidance == 1:
                raise PydanticCustomError(
                    "said",
                    "1 given, with which the negative prompt has no effect; "
                    "give another scale, such as 4, or take method text_to_image",
                )
            return guidance

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        needed = len(facts.tokens(self.config.negative)) + 2  # one opens a prompt and one closes it
        if needed > facts.max_tokens:
            raise UserError(
                f"null_prompt: the negative prompt has {needed} tokens, the backbone reads "
                f"{facts.max_tokens}: shorten {self.config.negative!r}"
            )

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        config = self.config
        with torch.no_grad():
            asked = condition(
                backbone, order.prompt, config.guidance, len(order.z_BCHW), negative=config.negative
            )
            z0_BCHW = denoise(backbone, order.z_BCHW, asked, self.sampler())
            return Generated(backbone.decode(z0_BCHW).clamp(-1, 1))
