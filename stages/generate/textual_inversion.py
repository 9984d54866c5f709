"""Textual inversion: a word for what the references show, and images of that word.

Gal et al., arXiv:2208.01618, Eq. 2: of the whole model only one vector v of the text encoder's input is
learned, as the word of sentences like "a photo of a v":

    v* = argmin E ‖ε − ε_θ(√ᾱ_t·z_0 + √(1−ᾱ_t)·ε, t, c(v))‖²,   ε ~ N(0, I), t uniform

The settings are DA-Fusion's (arXiv:2302.07944 and its code): batch 4, AdamW with weight decay 1e-2, which
shrinks v too, mirrored with probability ½, started at the word "the".

A model that predicts v is asked for its own target, √ᾱ·ε − √(1−ᾱ)·z_0, in place of ε (its error is that of ε
divided by √ᾱ), as diffusers' training scripts do, and a flow for its own, ε − z_0, at times drawn evenly.

Departures: z_0 is the VAE's posterior mean, of each reference and of its mirror image encoded once, not a
sample at each step. References and sentences are drawn with replacement. The authors' code learns a row of
the embedding table and restores all others after each step; here v is all that there is to learn, and the
table is not touched. The examples of a batch go through the model one at a time and their gradients are
added, for a call has one timestep: the memory is that of one example.

Shape letters: B batch, N references, S steps, C H W latent, h w image, D width of a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.errors import UserError
from schemas.settings import Settings
from stages import registry
from stages.contract import Backbone, Facts, Generate, Generated, Material, Models, Need, Order, Text
from stages.generate.settings import SamplerSettings
from stages.sampling import Condition, add_noise, denoise, output_of

WORD = "{token}"  # where a template has the word

TEMPLATES = (
    "a photo of a {token}",
    "a picture of a {token}",
    "an image of a {token}",
    "a photo of the {token}",
    "a picture of the {token}",
    "an image of the {token}",
    "a photo of one {token}",
    "a photo of my {token}",
    "a good photo of a {token}",
    "a small photo of a {token}",
    "a dark photo of the {token}",
    "a close photo of the {token}",
)


class TokenSettings(Settings):
    """How a word is learned for the references of a class."""

    placeholder: str = Field(default="<token>", min_length=1)
    """What stands for the word in the prompts of samples; nothing that the model knows already."""
    start: str | None = "the"
    """Known word of one token whose vector v starts from; "the" in DA-Fusion. null: the mean of all words."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = TEMPLATES
    """Sentences in which v is learned, each with {token} once; in the style of CLIP's for photographs."""
    steps: int = Field(default=1000, ge=1)
    """Gradient steps; 1000 in DA-Fusion, 5000 in Gal et al. tangram has a word after about 150."""
    batch: int = Field(default=4, ge=1)
    """Examples in a step; 4 in DA-Fusion."""
    lr: float = Field(default=2e-3, gt=0)
    """AdamW's; 2e-3 in DA-Fusion (5e-4, multiplied by the batch of 4)."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's, of v itself: each step takes lr times this share off it. 1e-2 in DA-Fusion."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability that an example is mirrored, left and right; 0.5 in DA-Fusion. 0 where sides matter."""

    @field_validator("templates")
    @classmethod
    def _each_has_the_word(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count(WORD) != 1:
                raise PydanticCustomError(
                    "said", "each must have {word} once, given {given}",
                    {"word": WORD, "given": repr(template)},
                )  # fmt: skip
        return templates


def token_loss(
    backbone: Backbone,
    z0_1CHW: Float[Tensor, "1 C H W"],
    noise_1CHW: Float[Tensor, "1 C H W"],
    t: float,
    text: Text,
) -> Float[Tensor, ""]:
    """The mean squared error of the model's output at time t: of ε, v or n − x_0, whichever it predicts."""
    schedule = backbone.schedule
    level = schedule.level(t)
    output_1CHW = backbone.predict(add_noise(z0_1CHW, noise_1CHW, level), t, text)
    target_1CHW = output_of(z0_1CHW, noise_1CHW, level, schedule.prediction)
    return (output_1CHW - target_1CHW).square().mean()


def learn_token(
    backbone: Backbone,
    image_N3hw: Float[Tensor, "N 3 h w"],
    settings: TokenSettings,
    rng: np.random.Generator,
) -> tuple[Float[Tensor, " D"], Float[Tensor, " S"]]:
    """The vector v of a word for the images, and the loss of each step's examples before the step."""
    with torch.no_grad():  # one image at a time: neither memory nor bits depend on how many there are
        both = [torch.cat([backbone.encode(i[None]), backbone.encode(i[None].flip(-1))]) for i in image_N3hw]
    z_N2CHW, ladder = torch.stack(both), backbone.schedule.ladder
    losses = []
    with torch.enable_grad():
        word_D = backbone.word(settings.start).detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([word_D], lr=settings.lr, weight_decay=settings.weight_decay)
        for _ in range(settings.steps):
            optimizer.zero_grad()
            loss = 0.0
            for _ in range(settings.batch):
                image, mirrored = rng.integers(len(z_N2CHW)), int(rng.random() < settings.flip)
                template = settings.templates[rng.integers(len(settings.templates))]
                t = ladder[rng.integers(len(ladder))]
                z0_1CHW = z_N2CHW[image, mirrored][None]
                noise = torch.from_numpy(rng.standard_normal(z0_1CHW.shape, dtype=np.float32))
                text = backbone.embed_words(template, {WORD: word_D[None]})
                example = token_loss(backbone, z0_1CHW, noise.to(z0_1CHW), t, text)
                # of the sum of squares: the gradient of the mean is nothing in the half precision of a model
                (example * z0_1CHW.numel()).backward()
                loss += float(example.detach()) / settings.batch
            assert word_D.grad is not None
            word_D.grad /= z_N2CHW[0, 0].numel() * settings.batch
            optimizer.step()
            losses.append(loss)
    return word_D.detach(), torch.tensor(losses)


def with_token(prompt: str, target: str, placeholder: str) -> str:
    """The prompt with the placeholder where the words of the class stood."""
    return _class_words(target).sub(lambda _: placeholder, prompt)


def _class_words(target: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(target)}(?!\w)")  # whole words: no "ring" in "a string"


class LearnsToken(Generate):
    """A method whose prompt has a learned word in place of the class, unless the setting `token` is null.

    Methods with the same token settings share one artifact: what else a method does is not part of it.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"words"})

    def prepared(self) -> Mapping[str, Any] | None:
        token: TokenSettings | None = self.config.token
        if token is None:
            return None
        # what the word is called changes nothing of its vector
        learned = token.model_dump(mode="json", exclude={"placeholder"})
        return {"textual_inversion": learned, "version": TextualInversion.version}

    def prepare(self, backbone: Backbone, models: Models, material: Material) -> dict[str, Tensor]:
        word_D, losses_S = learn_token(
            backbone, material.image_N3hw, self.config.token, material.chance.own()
        )
        return {"word_D": word_D, "losses_S": losses_S}

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        super().check(facts, models, target, prompt)
        token: TokenSettings | None = self.config.token
        if token is None:
            return
        placeholder, start = token.placeholder, token.start
        if facts.is_piece(placeholder):
            raise UserError(
                f"generate: token.placeholder {placeholder!r} is in the model's vocabulary already;"
                f" give something that is not, such as <{placeholder}>"
            )
        if start is not None and len(pieces := facts.tokens(start)) != 1:
            raise UserError(
                f"generate: token.start {start!r} is {len(pieces)} tokens of the model; give a word that it"
                " knows as one, or null for the mean of all words"
            )
        if not _class_words(target).search(prompt):
            raise UserError(
                f"generate: the prompt {prompt!r} does not name the class {target!r}, so there is no place"
                " for its token; give a prompt with {class}"
            )
        if placeholder in _class_words(target).sub("", prompt):
            raise UserError(
                f"generate: token.placeholder {placeholder!r} stands in the prompt {prompt!r} already;"
                " give another one"
            )

    def asked(self, backbone: Backbone, order: Order) -> tuple[Sequence[str], Condition]:
        """The prompt of each row, and the condition that the learned word makes of it."""
        prompt = with_token(order.prompt, order.target, self.config.token.placeholder)
        word_D = order.artifact["word_D"].to(backbone.device)
        batch = len(order.z_BCHW)
        # the text of one row, repeated: every row gets the same bits
        text = backbone.embed_words(prompt, {self.config.token.placeholder: word_D[None]}).expand(batch)
        negative = backbone.embed([""]).expand(batch)
        return [prompt] * batch, Condition(text, negative, self.sampler().guidance)


@registry.method("textual_inversion")
class TextualInversion(LearnsToken):
    """Images from seeds, of a word learned from the class's references."""

    class Config(SamplerSettings):
        method: Literal["textual_inversion"] = "textual_inversion"
        token: TokenSettings = TokenSettings()
        """How the word is learned."""
        steps: int = Field(50, ge=1)
        """Sampler steps; 50 in Gal et al."""
        guidance: float = Field(7.5, ge=0)
        """Scale of classifier-free guidance; 7.5 in DA-Fusion. 1 is none."""

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        with torch.no_grad():
            prompts, condition = self.asked(backbone, order)
            z0_BCHW = denoise(backbone, order.z_BCHW, condition, self.sampler())
            return Generated(backbone.decode(z0_BCHW).clamp(-1, 1), prompts=prompts)
