"""Cap2Aug: the class's own references, redrawn with the caption of another one.

Roy et al., arXiv:2212.05404, with the constants of the authors' code: a captioning model says what each
reference shows, and image-to-image at strength 0.75 and guidance 7.5 is asked for

    the class's prompt, without its full stop, and then " and " and a caption of the class

Captions are made once for each reference and are the class's artifact.

Departures: the authors combine an image with the captions of up to five images of its class, itself among
them; here each candidate draws one of all captions of its class, so that a build may have any number of
candidates. A prompt that is longer than the text encoder reads ends with the last word of the caption that
fits; theirs is cut within a word. Those of `stages.generate.redraw`. The default captioner is tangram's own;
theirs is BLIP-large.

Shape letters: see `stages.generate.redraw`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from stages import registry
from stages.contract import Backbone, Material, Models, Need, Order
from stages.generate.redraw import FixedRedraw, RedrawSettings
from stages.sampling import Condition, condition


def to_bytes(text: str) -> UInt8[Tensor, " bytes"]:
    """A text as a tensor, for artifacts hold nothing else: its UTF-8 bytes."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def from_bytes(text: UInt8[Tensor, " bytes"]) -> str:
    """The text of `to_bytes`."""
    return bytes(text.tolist()).decode()


def captioned(backbone: Backbone, prompt: str, caption: str) -> str:
    """The prompt and as much of the caption as the text encoder reads, cut at a word."""
    words = caption.split()
    while words:
        text = f"{prompt.strip().removesuffix('.')} and {' '.join(words)}"
        try:
            backbone.embed([text])
        except UserError:  # it is too long
            words.pop()
        else:
            return text
    return prompt


@registry.method("cap2aug")
class Cap2Aug(FixedRedraw):
    """References of the class, changed towards what other references of the class show."""

    starts_from: ClassVar[Literal["seed", "reference", "source"]] = "reference"
    needs: ClassVar[frozenset[Need]] = frozenset({"prompt"})

    class Config(RedrawSettings):
        method: Literal["cap2aug"] = "cap2aug"
        captioner: str = Field("tangram", min_length=1)
        """tangram, a local folder with a transformers image-to-text model, or an id on the Hugging Face hub
        such as Salesforce/blip-image-captioning-large, which the authors use."""
        ratio: float = Field(0.75, gt=0, le=1)
        """Noise ratio r, the share of the steps that are made, above 0 to 1; 0.75 in Cap2Aug."""

    def models(self) -> Mapping[str, str]:
        return {"captioner": self.config.captioner}

    def prepared(self) -> Mapping[str, str | int]:
        return {"captions": self.version}

    def prepare(self, backbone: Backbone, models: Models, material: Material) -> dict[str, Tensor]:
        captioner = models.captioner(self.config.captioner)
        captions = [captioner.caption(image_3hw) for image_3hw in material.image_N3hw]
        return {f"caption_{n:06d}": to_bytes(caption) for n, caption in enumerate(captions)}

    def asked(self, backbone: Backbone, order: Order) -> tuple[Sequence[str], Condition]:
        captions = [from_bytes(text) for _, text in sorted(order.artifact.items())]
        drawn = [captions[chance.own().integers(len(captions))] for chance in order.chances]
        prompts = [captioned(backbone, order.prompt, caption) for caption in drawn]
        return prompts, condition(backbone, prompts, self.config.guidance, len(prompts))
