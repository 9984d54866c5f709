"""Latent diffusion models behind `stages.contract.Backbone`: what all kinds share, and the kinds.

Weights are read as safetensors only, and no code that comes with a model is ever run.

What makes it fast and leaves the images as they are but for rounding happens here, out of sight of methods:
convolutions have their channels last in memory, GPUs run networks compiled, and a large batch is decoded in
slices, for an image takes more memory there than anywhere else.

Shape letters: B batch, C H W latent, h w image, L D text tokens and width, P pooled width.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from stages.backbones.diffusion.text import TextEncoder
from stages.contract import Text
from stages.schedule import Schedule

# Pixels that are decoded at once: eight images of 512 x 512.
DECODED_PIXELS = 8 * 512 * 512


class LatentDiffusion(ABC):
    """A network in the latent space of an autoencoder. Subclasses say how it reads texts and is asked."""

    def __init__(
        self,
        *,
        denoiser: Any,
        vae: Any,
        encoders: Sequence[TextEncoder],
        schedule: Schedule,
        fingerprint: str,
        device: torch.device,
        what: str,
        compile: bool = True,
        decoder: Any = None,
    ):
        channels = denoiser.config.in_channels
        if channels != vae.config.latent_channels:
            raise UserError(
                f"{what}: its network reads {channels} channels, its VAE gives {vae.config.latent_channels}"
                " (an inpainting or depth model?); give a text-to-image model"
            )
        parts = [denoiser, vae, *(encoder.model for encoder in encoders), *([decoder] if decoder else [])]
        for part in parts:
            part.to(device).eval().requires_grad_(False)
            if device.type == "cuda":  # elsewhere weights stay in the file's pages, which processes share
                part.to(memory_format=torch.channels_last)
        if compile and device.type == "cuda":
            compile_networks(denoiser, vae.decoder if decoder is None else decoder)
        self.denoiser, self.vae, self._decoder, self._encoders = denoiser, vae, decoder, tuple(encoders)
        self._scale = vae.config.scaling_factor
        self._shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._embed = lru_cache(maxsize=256)(self._embed_uncached)
        self.schedule, self.fingerprint = schedule, fingerprint
        self.device, self.dtype = device, denoiser.dtype
        side = denoiser.config.sample_size
        self.latent_shape = (channels, side, side)
        self.image_size = side * 2 ** (len(vae.config.block_out_channels) - 1)

    def embed(self, prompts: Sequence[str]) -> Text:
        return Text.cat([self._embed(prompt) for prompt in prompts])

    def _embed_uncached(self, prompt: str) -> Text:
        return self._joined([encoder.encode(prompt) for encoder in self._encoders])

    def embed_words(self, prompt: str, words: Mapping[str, Float[Tensor, "B D"]]) -> Text:
        """The vectors of all encoders lie side by side in a word."""
        widths = [encoder.width for encoder in self._encoders]
        split = {word: vector_BD.split(widths, dim=1) for word, vector_BD in words.items()}
        return self._joined(
            [
                encoder.encode_words(prompt, {word: parts[n] for word, parts in split.items()})
                for n, encoder in enumerate(self._encoders)
            ]
        )

    @abstractmethod
    def _joined(self, said: Sequence[tuple[Tensor, Tensor | None]]) -> Text:
        """One text from what each encoder says."""

    def word(self, text: str | None) -> Float[Tensor, " D"]:
        return torch.cat([encoder.word(text) for encoder in self._encoders])

    def predict(self, z_BCHW: Float[Tensor, "B C H W"], t: float, text: Text) -> Float[Tensor, "B C H W"]:
        t_B = torch.full((len(z_BCHW),), t, device=self.device)
        output_BCHW = self._ask(channels_last(z_BCHW.to(self.dtype)), t_B, text)
        return output_BCHW.to(z_BCHW.dtype, memory_format=torch.contiguous_format)

    @abstractmethod
    def _ask(self, z_BCHW: Tensor, t_B: Tensor, text: Text) -> Tensor:
        """The network's output."""

    def encode(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C H W"]:
        latent_BCHW = self._encoded(channels_last(image_B3hw.to(self.vae.dtype)))
        latent_BCHW = latent_BCHW.to(image_B3hw.dtype, memory_format=torch.contiguous_format)
        return (latent_BCHW - self._shift) * self._scale

    def _encoded(self, image_B3hw: Tensor) -> Tensor:
        return self.vae.encode(image_B3hw).latent_dist.mean

    def decode(self, z_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        if self._decoder is not None:  # reads the scaled latents of its VAE
            network, latent_BCHW = self._decoder, z_BCHW
        else:
            network, latent_BCHW = self.vae, z_BCHW / self._scale + self._shift
        latent_BCHW = channels_last(latent_BCHW.to(network.dtype))
        rows = slice_of(len(z_BCHW), DECODED_PIXELS // self.image_size**2)
        slices = [network.decode(slice_BCHW).sample for slice_BCHW in latent_BCHW.split(rows)]
        return torch.cat(slices).to(z_BCHW.dtype, memory_format=torch.contiguous_format)


def channels_last(batch: Tensor) -> Tensor:
    return batch.contiguous(memory_format=torch.channels_last)


def slice_of(batch: int, limit: int) -> int:
    """The most rows up to `limit` that a batch falls into without remainder: another size has other bits."""
    return max(rows for rows in range(1, max(min(batch, limit), 1) + 1) if batch % rows == 0)


def compile_networks(*networks: torch.nn.Module) -> None:
    """Let torch.compile have networks, each batch size by itself.

    Sizes would share code if torch were left to it, and which do would depend on what a process saw first,
    so that two workers could give other bits. For the same reason nothing is chosen by timing.
    """
    import torch._dynamo
    import torch._inductor.config

    # of diffusers' own questions after the version of torch, twenty lines a worker, nothing to act on
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    torch._inductor.config.deterministic = True
    torch._dynamo.config.recompile_limit = 64  # sizes of a batch, with and without gradient
    for network in networks:
        network.compile(dynamic=False)


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x and 2.x (Rombach et al., arXiv:2112.10752), and tangram: a UNet, one text
    encoder."""

    def _joined(self, said: Sequence[tuple[Tensor, Tensor | None]]) -> Text:
        return Text(said[0][0])

    def _ask(self, z_BCHW: Tensor, t_B: Tensor, text: Text) -> Tensor:
        return self.denoiser(z_BCHW, t_B, encoder_hidden_states=text.tokens_BLD).sample


class StableDiffusionXL(LatentDiffusion):
    """SDXL and what is distilled from it (Podell et al., arXiv:2307.01952): two text encoders, one pooled.

    Of size and crop the network is told that the image is whole and of the native size. Checkpoints that say
    so (`force_zeros_for_empty_prompt`, as SDXL's) read no words as zeros, which is what diffusers does when
    no negative prompt is given."""

    def __init__(self, *, zeros_for_no_words: bool, **parts: Any):
        super().__init__(**parts)
        self._zeros_for_no_words = zeros_for_no_words
        side = float(self.image_size)
        self._time_ids_6 = torch.tensor([side, side, 0, 0, side, side], device=self.device, dtype=self.dtype)

    def _embed_uncached(self, prompt: str) -> Text:
        text = super()._embed_uncached(prompt)
        return text.map(torch.zeros_like) if prompt == "" and self._zeros_for_no_words else text

    def _joined(self, said: Sequence[tuple[Tensor, Tensor | None]]) -> Text:
        return Text(torch.cat([tokens_BLD for tokens_BLD, _ in said], dim=2), said[-1][1])

    def _ask(self, z_BCHW: Tensor, t_B: Tensor, text: Text) -> Tensor:
        added = {"text_embeds": text.pooled_BP, "time_ids": self._time_ids_6.expand(len(z_BCHW), 6)}
        return self.denoiser(
            z_BCHW, t_B, encoder_hidden_states=text.tokens_BLD, added_cond_kwargs=added
        ).sample


class StableDiffusion3(LatentDiffusion):
    """Stable Diffusion 3 (Esser et al., arXiv:2403.03206): a transformer, two CLIP encoders and T5, or
    zeros."""

    T5_TOKENS = 256

    def _joined(self, said: Sequence[tuple[Tensor, Tensor | None]]) -> Text:
        (first_BLD, first_BP), (second_BLD, second_BP), *t5 = said
        assert first_BP is not None
        assert second_BP is not None
        width = self.denoiser.config.joint_attention_dim
        clip_BLD = torch.cat([first_BLD, second_BLD], dim=2)
        t5_BLD = t5[0][0] if t5 else clip_BLD.new_zeros(len(clip_BLD), self.T5_TOKENS, width)
        clip_BLD = F.pad(clip_BLD, (0, width - clip_BLD.shape[2]))
        return Text(torch.cat([clip_BLD, t5_BLD], dim=1), torch.cat([first_BP, second_BP], dim=1))

    def _ask(self, z_BCHW: Tensor, t_B: Tensor, text: Text) -> Tensor:
        return self.denoiser(
            hidden_states=z_BCHW,
            timestep=t_B,
            encoder_hidden_states=text.tokens_BLD,
            pooled_projections=text.pooled_BP,
        ).sample


class UnconditionalLatentDiffusion(LatentDiffusion):
    """A UNet over the latents of a VQ model, without prompts: LDM-CelebA-HQ, LDM-FFHQ (arXiv:2112.10752)."""

    def _embed_uncached(self, prompt: str) -> Text:
        return Text(torch.zeros(1, 0, 0, device=self.device, dtype=self.dtype))

    def _joined(self, said: Sequence[tuple[Tensor, Tensor | None]]) -> Text:
        raise UserError("this backbone reads no prompts, so it has no words")

    def word(self, text: str | None) -> Float[Tensor, " D"]:
        raise UserError("this backbone reads no prompts, so it has no words")

    def embed_words(self, prompt: str, words: Mapping[str, Float[Tensor, "B D"]]) -> Text:
        raise UserError("this backbone reads no prompts, so it has no words")

    def _ask(self, z_BCHW: Tensor, t_B: Tensor, text: Text) -> Tensor:
        return self.denoiser(z_BCHW, t_B).sample

    def _encoded(self, image_B3hw: Tensor) -> Tensor:
        return self.vae.encode(image_B3hw).latents
