"""The shipped parts in fp32 for measuring, and a plain text-to-image loop over them.

The pipeline has its own loaders and its own sampler; this file stays apart, so that the figures of the model
card do not move when the pipeline does. Shape letters: B batch, L tokens, D text width, C H W latent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from jobs.tangram.clip import CLASS_PROMPTS
from jobs.tangram.data import to_model
from jobs.tangram.diffusion import tokenised
from jobs.tangram.drawings import generator

STEPS, GUIDANCE, BATCH = 20, 3.5, 64


@dataclass(frozen=True)
class Tangram:
    """Every part of a layout, in fp32 and in evaluation mode."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    clip: open_clip.CLIP
    classifier: nn.Module
    judge: nn.Module


def load(folder: Path) -> Tangram:
    """Load a layout as a stranger would, through each library's own reader."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()
    return Tangram(
        vae=AutoencoderKL.from_pretrained(folder / "vae").float().eval(),
        unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        clip=clip.float().eval(),
        classifier=load_classifier(folder / "classifier"),
        judge=load_classifier(folder / "judge"),
    )


def load_classifier(folder: Path) -> nn.Module:
    """A timm network from config.json and model.safetensors."""
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], pretrained=False, **config["args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval()


@torch.no_grad()
def class_scores(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Logits (N, K) of a classifier for uint8 pixels (N, 3, 64, 64)."""
    return torch.cat([model(to_model(chunk)) for chunk in pixels.split(128)])


@torch.no_grad()
def clip_scores(tangram: Tangram, pixels: torch.Tensor) -> torch.Tensor:
    """Cosines (N, K) of pictures with "a photo of a {class}"."""
    text_KD = tangram.clip.encode_text(tokenised(tangram.tokenizer, CLASS_PROMPTS), normalize=True)
    chunks = [tangram.clip.encode_image(to_model(chunk), normalize=True) for chunk in pixels.split(128)]
    return torch.cat(chunks) @ text_KD.T


@torch.no_grad()
def reconstruct(tangram: Tangram, pixels: torch.Tensor) -> torch.Tensor:
    """Through the VAE and back: uint8 to uint8."""
    decoded = []
    for chunk in pixels.split(16):  # small enough for its activations to stay in the cache
        latent = tangram.vae.encode(to_model(chunk)).latent_dist.mean
        decoded.append(to_pixels(tangram.vae.decode(latent).sample))
    return torch.cat(decoded)


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """Float -1..1 to uint8 0..255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def noise_of(shape: str, index: int, split: str = "text_to_image") -> torch.Tensor:
    """Seed (4, 16, 16) number `index` of a class."""
    values = generator(split, shape, index).standard_normal((4, 16, 16))
    return torch.from_numpy(values.astype(np.float32))


@torch.no_grad()
def paint(tangram: Tangram, prompts: list[str], seeds_BCHW: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """DDIM with classifier-free guidance: one picture per prompt and seed, uint8 (B, 3, 64, 64)."""
    pictures = []
    for first in range(0, len(prompts), BATCH):
        z = seeds_BCHW[first : first + BATCH]
        texts = prompts[first : first + BATCH]
        tokens_BL = tokenised(tangram.tokenizer, [""] * len(texts) + texts)
        text_BLD = tangram.text_encoder(tokens_BL).last_hidden_state
        tangram.scheduler.set_timesteps(steps)
        for t in tangram.scheduler.timesteps:
            free, asked = tangram.unet(torch.cat([z, z]), t, encoder_hidden_states=text_BLD).sample.chunk(2)
            z = tangram.scheduler.step(free + GUIDANCE * (asked - free), t, z).prev_sample
        z = z / tangram.vae.config.scaling_factor
        pictures += [to_pixels(tangram.vae.decode(chunk).sample) for chunk in z.split(16)]
    return torch.cat(pictures)
