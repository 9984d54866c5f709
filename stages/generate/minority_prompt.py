"""MinorityPrompt: a word at the end of the prompt that is learned while the image is drawn, to make it rare.

Um & Ye, "Minority-focused text-to-image generation via prompt optimization", arXiv:2410.07838. The prompt
with learnable words is C_v, without them C. At a step with latents z_t, without guidance (on a flow z_s =
(1−σ_s)·x̂0¹ + σ_s·n),

    x̂0¹ = x̂0(z_t, C_v),  z_s = √ᾱ_s·x̂0¹ + √(1−ᾱ_s)·n,  x̂0² = x̂0(z_s, C),
    J = ‖x̂0¹ − sg x̂0²‖² + λ·‖sg x̂0¹ − x̂0²‖²,

where sg stops the gradient. K steps of Adam raise J over the vectors v, each with a new n. Adam starts anew
at every timestep, v goes on. Then DDIM takes its guided step with C_v. By Proposition 1,
ᾱ_s/(1−ᾱ_s)·‖x̂0¹ − x̂0²‖² = ‖n − ε(z_s, C)‖², the error of the model on x̂0¹: large where images are rare. With
λ = 1 the gradient is that of Eq. 7, the plain ‖x̂0¹ − x̂0²‖² through both arguments.

Departures. Published code takes norms, the paper and this file squares. It pads its list of ᾱ, so its ᾱ are
one timestep off; here ᾱ_s belongs to the s that the model is asked at. It anneals s = T − (t − ⌊T/n⌋ + 1)
over n steps, out of range at the end; here clamped to 1 … T−1. It keeps C_v in steps that are not optimised
unless a flag is set; the paper goes back to C, and so does `unoptimised: base`. It starts v where its library
initialises new tokens; here at the mean of the vocabulary. It trains the whole table of embeddings and puts
the other rows back; here they are never touched. It computes the text encoder in float32; here all networks
have the backbone's precision, and v is float32. Defaults are text_to_image's steps and guidance; the paper's
are 50 and 7.5, and for SDXL-Lightning 4 and 1 with K = 3, above = 0, level = annealed.

`objective: diversity` stands for Eq. 9, whose text was not at hand: the published code raises the distances
between the x̂0(z_t, C_v) of a batch. Here row i raises the mean of its squared distances to the
other rows; squared, because a distance has no gradient at 0, where two equal rows are. λ, level and noise
play no part. The group is the batch with all its slots, so rows depend on one another: on `batch`, and a row
that is not finite spoils its batch.

A backbone with several text encoders needs nothing here: its `word` gives what its `embed_words` takes, such
as the vectors of all its encoders side by side.

Shape letters: B batch, C H W latent, D width of a word, N learnable words.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from stages import registry
from stages.contract import Backbone, Facts, Generate, Generated, Models, Need, Order, Text
from stages.generate.noise import row_noise
from stages.generate.settings import SamplerSettings
from stages.memory import EVERYTHING, Memory
from stages.sampling import Condition, add_noise, condition, denoise, path_of, to_x0


def predict_x0(
    backbone: Backbone, z_BCHW: Float[Tensor, "B C H W"], t: float, text: Text
) -> Float[Tensor, "B C H W"]:
    """x̂0 at time t of training, without guidance."""
    schedule = backbone.schedule
    return to_x0(z_BCHW, backbone.predict(z_BCHW, t, text), schedule.level(t), schedule.prediction)


def minority_objective(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    t: float,
    learned: Text,
    base: Text,
    noise_BCHW: Float[Tensor, "B C H W"],
    s: float,
    lambda_: float,
    memory: Memory = EVERYTHING,
) -> Float[Tensor, " B"]:
    """J of each row. Rows do not mix, so the gradient of the sum holds each row's own gradient."""
    first_BCHW = memory.run(predict_x0, backbone, z_BCHW, t, learned)
    noised_BCHW = add_noise(first_BCHW, noise_BCHW, backbone.schedule.level(s))
    with torch.set_grad_enabled(torch.is_grad_enabled() and lambda_ > 0):
        second_BCHW = memory.run(predict_x0, backbone, noised_BCHW, s, base)
    through_first_B = (first_BCHW - second_BCHW.detach()).square().sum(dim=(1, 2, 3))
    through_second_B = (first_BCHW.detach() - second_BCHW).square().sum(dim=(1, 2, 3))
    return through_first_B + lambda_ * through_second_B


def diversity_objective(
    backbone: Backbone,
    z_BCHW: Float[Tensor, "B C H W"],
    t: float,
    learned: Text,
    memory: Memory = EVERYTHING,
) -> Float[Tensor, " B"]:
    """The mean squared distance of each row's x̂0 to those of the other rows."""
    x0_BM = memory.run(predict_x0, backbone, z_BCHW, t, learned).flatten(1)
    distance_BB = (x0_BM[:, None] - x0_BM[None]).square().sum(dim=2)
    return distance_BB.sum(dim=1) / (len(x0_BM) - 1)


def noise_timestep(level: float | Literal["annealed"], t: float, steps: int, total: int) -> float:
    """s, at which x̂0¹ is noised again: a share of the T = `total` timesteps, or mirrored from t."""
    s = total - (t - total // steps + 1) if level == "annealed" else round(level * total)
    return min(max(s, 1), total - 1)


@registry.method("minority_prompt")
class MinorityPrompt(Generate):
    """Images of the prompt from seeds, made rare. Adam is elementwise, so rows mix for `diversity` alone."""

    needs: ClassVar[frozenset[Need]] = frozenset({"words"})

    class Config(SamplerSettings):
        method: Literal["minority_prompt"] = "minority_prompt"
        steps: int = Field(20, ge=1)
        """Sampler steps, as in text_to_image; the paper's Stable Diffusion draws with 50."""
        guidance: float = Field(4.0, ge=0)
        """Scale of classifier-free guidance in the images, not in the objective. The paper's is 7.5."""
        objective: Literal["minority", "diversity"] = "minority"
        """minority: images that are unlikely; diversity: images that differ from the others of the batch."""
        iterations: int = Field(10, ge=1)
        """K, steps of Adam at each optimised timestep (authors' code; 3 for SDXL-Lightning)."""
        lr: float = Field(0.01, gt=0)
        """Adam's, about the change of each coordinate of a word in one iteration (authors' code; for
        SDXL-Lightning 0.001 with the start word "cool")."""
        lambda_: float = Field(1.0, ge=0)
        """λ, the weight of the half whose gradient goes through the second prediction (paper)."""
        every: int = Field(1, ge=1)
        """N: words are optimised in step 0, N, 2N … (authors' code: 1)."""
        above: float = Field(0.9, ge=0, le=1)
        """Words are optimised at timesteps t above this share of T; 1: never (authors' code; 0 for
        SDXL-Lightning)."""
        level: Annotated[float, Field(gt=0, lt=1)] | Literal["annealed"] = 0.75
        """s as a share of T, between 0 and 1 (authors' code); annealed: more noise the later in sampling."""
        unoptimised: Literal["base", "learned"] = "base"
        """What a step without optimisation is asked for: base, the prompt (paper); learned, the prompt with
        the words as last learned (authors' code)."""
        start: str | None = None
        """A word of one token whose vector the learnable words start from, which steers the meaning; none:
        the mean of the vocabulary."""
        tokens: int = Field(1, ge=1, le=10)
        """Learnable words of one token each (authors' code: 1)."""
        placeholder: str = Field("*", pattern=r"^\S+$")
        """The learnable words are written PLACEHOLDER_0, PLACEHOLDER_1 … at the end of the prompt; the
        backbone's vocabulary must not have them."""

    def words(self) -> list[str]:
        """The learnable words as they stand in the prompt."""
        return [f"{self.config.placeholder}_{n}" for n in range(self.config.tokens)]

    def check(self, facts: Facts, models: Models, target: str, prompt: str) -> None:
        start = self.config.start
        for word in self.words():
            if facts.is_piece(word) or word in prompt:
                where = "the prompt" if word in prompt else "the backbone's vocabulary"
                raise UserError(
                    f"minority_prompt: {where} already has {word!r}; set placeholder to another word"
                )
        if start is not None and (pieces := len(facts.tokens(start))) != 1:
            raise UserError(
                f"minority_prompt: start {start!r} is {pieces} tokens of the backbone; "
                "give a word of one token, or none for the mean of all"
            )
        needed = len(facts.tokens(prompt)) + self.config.tokens + 2  # one opens a prompt and one closes it
        if needed > facts.max_tokens:
            raise UserError(
                f"minority_prompt: the prompt has {needed} tokens with the learnable ones, the backbone "
                f"reads {facts.max_tokens}: shorten {prompt!r}"
            )

    def __call__(self, backbone: Backbone, models: Models, order: Order) -> Generated:
        config, words, batch = self.config, self.words(), len(order.z_BCHW)
        if config.objective == "diversity" and batch == 1:
            raise UserError(
                "minority_prompt: objective diversity compares the rows of a batch, and this batch has one: "
                "set the recipe's batch to at least 2"
            )
        times, total = path_of(backbone, self.sampler()).times, backbone.schedule.total
        streams = [chance.own() for chance in order.chances]
        base = condition(backbone, order.prompt, config.guidance, batch)
        v_NBD = backbone.word(config.start).expand(len(words), batch, -1).clone().requires_grad_()
        history: list[Tensor] = []
        memory, asked = Memory.spare(backbone.device), base

        def learned() -> Text:
            prompt = " ".join([order.prompt, *words])
            return backbone.embed_words(prompt, dict(zip(words, v_NBD, strict=True)))

        def objective(z_BCHW: Tensor, t: float) -> Tensor:
            memory.begin()
            if config.objective == "diversity":
                return diversity_objective(backbone, z_BCHW, t, learned(), memory)
            noise_BCHW = row_noise(streams, z_BCHW)
            s = noise_timestep(config.level, t, config.steps, total)
            return minority_objective(
                backbone, z_BCHW, t, learned(), base.text, noise_BCHW, s, config.lambda_, memory
            )

        @torch.enable_grad()
        def improve(z_BCHW: Tensor, t: float) -> None:
            optimizer = torch.optim.Adam([v_NBD], lr=config.lr, maximize=True)
            for _ in range(config.iterations):
                objective_B = objective(z_BCHW, t)
                (v_NBD.grad,) = torch.autograd.grad(objective_B.sum(), v_NBD)
                optimizer.step()
                history.append(objective_B.detach())

        def ask(k: int, z_BCHW: Tensor) -> Condition:
            nonlocal asked
            if k % config.every == 0 and times[k] > config.above * total:
                improve(z_BCHW, times[k])
                asked = Condition(learned(), base.negative, config.guidance)
            elif config.unoptimised == "base":
                asked = base
            return asked

        with torch.no_grad():
            z0_BCHW = denoise(backbone, order.z_BCHW, ask, self.sampler())
            image_B3hw = backbone.decode(z0_BCHW).clamp(-1, 1)
        traces = torch.stack(history, dim=1).tolist() if history else [[]] * batch
        return Generated(image_B3hw, traces=traces)
