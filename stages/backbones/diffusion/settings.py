"""Which diffusion model draws the images, in the words that users know from diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from schemas.settings import Settings


class BackboneSettings(Settings):
    """Which diffusion model draws the images."""

    model: str = Field(default="tangram", min_length=1)
    """tangram (embedded), a local folder in the diffusers layout, or an id on the Hugging Face hub."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; its default branch when not set."""
    subfolder: str | None = None
    """Folder inside the local folder or hub id that holds the model."""
    variant: str | None = None
    """Variant of the weight files, such as fp16 for diffusion_pytorch_model.fp16.safetensors."""
    unet: str | None = None
    """Other weights for the UNet: a .safetensors file, or one on the hub as OWNER/NAME/FILE, as
    ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet.safetensors is laid over SDXL."""
    decoder: str | None = None
    """Lossy: a small decoder in place of the VAE's, a folder or hub id of an AutoencoderTiny
    (madebyollin/taesd for Stable Diffusion 1.x and 2.x, taesdxl, taesd3). Images are encoded by the VAE as
    before."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks; auto: bfloat16 on GPUs that have it, float16 on older ones, float32 on CPUs.
    The sampler always computes in float32."""
    compile: bool = True
    """Whether GPUs run the networks compiled, which takes a worker a minute or so for each size of batch,
    once on a machine. CPUs never do."""
