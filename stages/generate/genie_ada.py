"""GeNIe-Ada: GeNIe with the noise ratio chosen for each source, where its image changes class.

Koohpayegani et al., arXiv:2312.02548, §3.2 and Algorithm 1. The source is redrawn at every ratio
r_1 < … < r_M, and what comes out is looked at from the source's features Z_S towards the target's Z_T:

    d_m = (Z_{r_m} − Z_S)·(Z_T − Z_S) / ‖Z_T − Z_S‖,        r* = r_m at argmax_{m ≥ 2} |d_m − d_{m−1}|

Z are L2-normalised features; Z_T is the mean of them over the target's references, not normalised again, as
in the authors' code. Published: r ∈ {0.5, 0.6, 0.7, 0.8, 0.9}, 50 steps, guidance 7.5, features of a UniSiam
network at 224 pixels.

What follows from the rule as published, and is kept: the smallest ratio can never be chosen; |·| lets a jump
back, away from the target, win; of equal jumps the first wins. Departures: the extractor is a setting; where
Z_T = Z_S there is no direction, and every d is 0. Algorithm 1 has r_m = m/M; the experiments and this have
given ratios. For those of `stages.generate.redraw` see there.

Memory: the model's batch grows to rows × ratios, twice that with guidance, while the VAE decodes and the
extractor looks at one ratio at a time. A recipe's `batch` should be so much smaller than plain GeNIe's.

Shape letters: B batch, M ratios, N references, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.errors import UserError
from stages import registry
from stages.backbones.extractor import probe
from stages.contract import Backbone, Facts, Generated, Material, Models, Need, Order
from stages.generate.redraw import Redraw, RedrawSettings, redraw
from stages.sampling import condition, steps_of


def trajectory(
    z_MBE: Float[Tensor, "M B E"], source_BE: Float[Tensor, "B E"], target_E: Float[Tensor, " E"]
) -> Float[Tensor, "B M"]:
    """d: how far each redrawn image has come from its source towards the target, in features."""
    towards_BE = F.normalize(target_E - source_BE, dim=1)  # of no length where the two are one
    return torch.einsum("mbe,be->bm", z_MBE - source_BE, towards_BE)


def choose(d_BM: Float[Tensor, "B M"]) -> Int[Tensor, " B"]:
    """Index of the ratio after the largest jump: from 1 on, for the first ratio has none before it."""
    return 1 + d_BM.diff(dim=1).abs().argmax(dim=1)


@registry.method("genie_ada")
class GenieAda(Redraw):
    """Images of the target class that look like an image of another one, each at a ratio of its own."""

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "source"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    class Config(RedrawSettings):
        method: Literal["genie_ada"] = "genie_ada"
        ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
        """Noise ratios to choose from, at least 2, each above 0 to 1; the smallest is only compared with."""
        extractor: str = Field("tangram", min_length=1)
        """Network of the features: tangram, clip:NAME, a folder of timm's, timm:NAME, hf-hub:owner/name,
        package.module:factory."""

        @field_validator("ratios")
        @classmethod
        def _comparable(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
            given = ", ".join(f"{ratio:g}" for ratio in ratios) or "none"
            if not all(0 < ratio <= 1 for ratio in ratios):
                raise PydanticCustomError("said", "must be above 0 to 1, given {given}", {"given": given})
            if len(ratios) < 2:
                raise PydanticCustomError(
                    "said", "must be at least 2 to choose from, given {given}; genie has one `ratio`",
                    {"given": given},
                )  # fmt: skip
            if len(set(ratios)) < len(ratios):
                raise PydanticCustomError("said", "must all be different, given {given}", {"given": given})
            return tuple(sorted(ratios))

    def ratios(self) -> Sequence[float]:
        return self.config.ratios

    def models(self) -> Mapping[str, str]:
        return {"extractor": self.config.extractor}

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        super().check(facts, models, target, prompt)
        made: dict[int, float] = {}
        for ratio in self.config.ratios:
            steps = steps_of(ratio, self.config.steps)
            if steps in made:
                raise UserError(
                    f"generate: noise ratios {made[steps]} and {ratio} both make {steps} of"
                    f" {self.config.steps} steps; give ratios farther apart, or more steps"
                )
            made[steps] = ratio
        models.fingerprint("extractor", self.config.extractor)  # says what is wrong with a name

    def prepared(self) -> Mapping[str, Any]:
        return {"mean_of_normalised_features": self.version}

    def prepare(self, backbone: Backbone, models: Models, material: Material) -> dict[str, Tensor]:
        """Z_T. One reference at a time: neither memory nor bits depend on how many there are."""
        extractor = models.extractor(self.config.extractor)
        probe(extractor, self.config.extractor, material.image_N3hw[0])
        with torch.no_grad():
            z_NE = torch.cat(
                [
                    F.normalize(extractor.features(image_13hw), dim=1)
                    for image_13hw in material.image_N3hw.split(1)
                ]
            )
        return {"target_E": z_NE.double().mean(dim=0).to(z_NE.dtype)}

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        extractor, ratios = models.extractor(self.config.extractor), self.config.ratios
        assert order.source_B3hw is not None, "genie_ada starts from images"

        def features(image_B3hw: Tensor) -> Tensor:
            return F.normalize(extractor.features(image_B3hw).double(), dim=1)

        with torch.no_grad():
            z0_BCHW = self.encoded(backbone, order)
            asked = condition(backbone, order.prompt, self.config.guidance, len(z0_BCHW))
            z_MBCHW = redraw(backbone, z0_BCHW, order.z_BCHW, asked, self.sampler(), ratios)
            image_MB3hw = torch.stack([backbone.decode(z_BCHW).clamp(-1, 1) for z_BCHW in z_MBCHW])
            z_MBE = torch.stack([features(image_B3hw) for image_B3hw in image_MB3hw])
            d_BM = trajectory(z_MBE, features(order.source_B3hw), order.artifact["target_E"].double())
            chosen_B = choose(d_BM)
            image_B3hw = image_MB3hw[chosen_B, torch.arange(len(chosen_B), device=chosen_B.device)]
        return Generated(
            image_B3hw, noise_ratios=[ratios[m] for m in chosen_B.tolist()], traces=d_BM.tolist()
        )
