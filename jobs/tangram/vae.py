"""The autoencoder: 64x64 RGB to 4x16x16 latents and back (diffusers' AutoencoderKL, f = 4).

Shape letters: B batch, C channels, H W latent.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from jobs.tangram.data import epoch_batch, long_tail, to_model
from jobs.tangram.training import Schedule, fit

SCHEDULE = Schedule(steps=3600, learning_rate=2e-3, average=0.995)
BATCH = 16
# Weight of the KL term (per latent value) against the mean squared error (per pixel value in -1..1): large
# enough that neighbouring latents decode alike, small enough to cost about a tenth of the error.
KL_WEIGHT = 3e-4


def new_vae() -> AutoencoderKL:
    """The untrained architecture."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=64,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def train_vae(checkpoint: Path, *, steps: int | None = None, resume: bool = True) -> dict[str, float]:
    """Train to `checkpoint`; `finished_vae` reads it."""
    data = long_tail()
    vae = new_vae()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = epoch_batch(len(data.pixels), BATCH, step, "vae", 0)
        x = to_model(data.pixels[rows])
        # Quarter turns and mirrors: the tail has too few pictures to fill the plane by itself.
        turn, mirror = torch.randint(4, (), generator=generator), torch.randint(2, (), generator=generator)
        x = torch.rot90(x, int(turn), (2, 3))
        x = x.flip(3) if mirror else x
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = (decoded.float() - x).square().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return error + KL_WEIGHT * kl

    return fit("vae", vae, loss_at, SCHEDULE.lasting(steps), checkpoint, resume=resume)


@torch.no_grad()
def standardised(vae: AutoencoderKL, pixels: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder, whose latents of `pixels` (N, 3, 64, 64) get mean 0 and variance 1 per channel.

    Mean and spread of each channel go into the 1x1 convolutions around the latent, and the common spread
    into scaling_factor, so that diffusers' own convention (latent x scaling_factor) gives unit variance.
    """
    vae.eval()
    z = torch.cat([vae.encode(to_model(chunk)).latent_dist.mean for chunk in pixels.split(100)])
    mean_C, std_C = z.mean((0, 2, 3)), z.std((0, 2, 3))
    common = std_C.log().mean().exp()
    gain_C = common / std_C

    to_latent, from_latent = vae.quant_conv, vae.post_quant_conv
    channels = len(mean_C)
    from_latent.bias += (from_latent.weight[:, :, 0, 0] * mean_C).sum(1)
    from_latent.weight /= gain_C.view(1, -1, 1, 1)
    to_latent.weight[:channels] *= gain_C.view(-1, 1, 1, 1)
    to_latent.bias[:channels] = (to_latent.bias[:channels] - mean_C) * gain_C
    to_latent.bias[channels:] += 2 * gain_C.log()  # the second half holds log-variances
    vae.register_to_config(scaling_factor=round(1 / common.item(), 6))
    return vae
