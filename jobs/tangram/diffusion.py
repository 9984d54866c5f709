"""The latent diffusion model: a UNet with cross-attention and a CLIP text encoder, trained together.

Both learn from the long tail of drawings. Latents are computed once from the finished autoencoder.
Shape letters: B batch, L tokens, D text width, C H W latent (4, 16, 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from jobs.tangram.data import Drawings, epoch_batch, to_model
from jobs.tangram.drawings import CLASSES, caption
from jobs.tangram.training import Schedule, fit
from jobs.tangram.words import LENGTH, new_tokenizer

SCHEDULE = Schedule(steps=20000, learning_rate=1e-3, average=0.999)
BATCH = 64
TEXT_WIDTH = 128
FEW = 500  # drawings of a class, below which quarter turns are added
EMPTY_PROMPT_SHARE = 0.10  # captions replaced by "" for classifier-free guidance
MIN_SNR_GAMMA = 5.0  # Hang et al., arXiv:2303.09556, Eq. 7 in the form for noise prediction


class Painter(nn.Module):
    """UNet and text encoder as one trained thing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # diffusers reads this as the number of heads
            norm_num_groups=16,
        )
        # The explicit product: the fused kernel's backward is slow on CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        tokenizer = new_tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                hidden_act="quick_gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def forward(self, z_BCHW: torch.Tensor, t_B: torch.Tensor, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, C, H, W)."""
        text_BLD = self.text_encoder(tokens_BL).last_hidden_state
        return self.unet(z_BCHW, t_B, encoder_hidden_states=text_BLD).sample


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, without clipping, which is for pixels."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


@dataclass(frozen=True)
class Latents:
    """Scaled posterior means of drawings: z (M, C, H, W), and row (N, 4), which z is drawing n in turn k."""

    z: torch.Tensor
    row: torch.Tensor


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, data: Drawings) -> Latents:
    """Encode every drawing once, and those of classes with few drawings in all four quarter turns.

    A drawing turned by 90 degrees shows the same thing under the same caption; where there are hundreds of
    others that adds nothing.
    """
    few = data.labels.bincount(minlength=len(CLASSES))[data.labels] < FEW
    plain, turned = torch.arange(len(few)), few.nonzero()[:, 0]
    row = plain[:, None].repeat(1, 4)
    pixels = [data.pixels]
    for turn in (1, 2, 3):
        row[turned, turn] = len(few) + (turn - 1) * len(turned) + torch.arange(len(turned))
        pixels.append(torch.rot90(data.pixels[turned], turn, (2, 3)))
    chunks = []
    for chunk in torch.cat(pixels).split(128):
        # bf16 errs by less than a tenth of the posterior's own spread.
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_model(chunk)).latent_dist.mean
        chunks.append(mean.float() * vae.config.scaling_factor)
    return Latents(torch.cat(chunks), row)


def tokenised(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (B, LENGTH), padded with the end token."""
    rows = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return rows.input_ids


def train_diffusion(
    checkpoint: Path,
    latents: Latents,
    data: Drawings,
    *,
    steps: int | None = None,
    batch: int = BATCH,
    resume: bool = True,
    stop_at: int | None = None,
) -> dict[str, float]:
    """Train on cached latents; the averaged weights end up in `checkpoint`."""
    painter, tokenizer = Painter(), new_tokenizer()
    alpha_bar = new_scheduler().alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=MIN_SNR_GAMMA) / snr

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = epoch_batch(len(data.attributes), batch, step, "diffusion", 0)
        z = latents.z[latents.row[rows, torch.randint(4, (len(rows),), generator=generator)]]
        wording = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        texts = [
            "" if wording.random() < EMPTY_PROMPT_SHARE else caption(data.attributes[row], wording)
            for row in rows.tolist()
        ]
        t = torch.randint(1000, (len(rows),), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = painter(a.sqrt() * z + (1 - a).sqrt() * noise, t, tokenised(tokenizer, texts))
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return (weight[t] * error).mean()

    return fit(
        "diffusion", painter, loss_at, SCHEDULE.lasting(steps), checkpoint, resume=resume, stop_at=stop_at
    )
