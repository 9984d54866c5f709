"""Untrained diffusion models of every kind, a few thousand weights each, as diffusers pipelines.

Images are 16×16, latents 8×8; a prompt has 12 tokens of CLIP (a character is one), and of T5 as many as the
pipeline reads. Sizes apart, every component is of the class, and has the options, of the published model.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
LETTERS = sorted(ByteLevel.alphabet())
PIECES = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab={p: n for n, p in enumerate(PIECES)}, merges=[], model_max_length=12)


def clip_encoder(cls: type = CLIPTextModel, width: int = 16, layers: int = 1):
    return cls(
        CLIPTextConfig(
            vocab_size=len(PIECES), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=12, projection_dim=width,
            bos_token_id=len(PIECES) - 2, eos_token_id=len(PIECES) - 1, pad_token_id=len(PIECES) - 1,
        )
    )  # fmt: skip


def vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        **{
            "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "sample_size": 16,
            "latent_channels": 4, "scaling_factor": 0.9, **options,
        }
    )  # fmt: skip


def unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16,
            "attention_head_dim": 2, **options,
        }
    )  # fmt: skip


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5; its scheduler settings may be varied."""
    torch.manual_seed(0)
    encoder = clip_encoder()
    parts = unet(), vae()
    return quiet(
        StableDiffusionPipeline(
            parts[1], encoder, clip_tokenizer(), parts[0], DDIMScheduler(**DDIM), None, None,
            requires_safety_checker=False,
        )
    )  # fmt: skip


def stable_diffusion_2() -> StableDiffusionPipeline:
    """2.1: heads of one width, linear projections, v-prediction."""
    torch.manual_seed(1)
    network = unet(attention_head_dim=(1, 2), use_linear_projection=True)
    scheduler = DDIMScheduler(**DDIM, prediction_type="v_prediction")
    return quiet(
        StableDiffusionPipeline(
            vae(), clip_encoder(layers=2), clip_tokenizer(), network, scheduler, None, None,
            requires_safety_checker=False,
        )
    )  # fmt: skip


def stable_diffusion_xl(force_zeros: bool = True, **scheduler) -> StableDiffusionXLPipeline:
    torch.manual_seed(2)
    network = unet(
        cross_attention_dim=24, attention_head_dim=(1, 2), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip
    return quiet(
        StableDiffusionXLPipeline(
            vae(scaling_factor=0.7, force_upcast=True),
            clip_encoder(layers=2), clip_encoder(CLIPTextModelWithProjection, 8, 2),
            clip_tokenizer(), clip_tokenizer(), network,
            EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading", **scheduler),
            force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
        )
    )  # fmt: skip


def stable_diffusion_3(t5: bool = True) -> StableDiffusion3Pipeline:
    torch.manual_seed(3)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [chr(code) for code in range(33, 127)]
    pieces += [(f"{before}{letter}", -3.0) for before in ("", "▁") for letter in letters]
    third = T5EncoderModel(
        T5Config(vocab_size=len(pieces) + 100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()  # it has dropout
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=24,
        pos_embed_max_size=12,
    )  # fmt: skip
    return quiet(
        StableDiffusion3Pipeline(
            transformer, FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae(latent_channels=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False,
                use_post_quant_conv=False),
            clip_encoder(CLIPTextModelWithProjection, 16, 2), clip_tokenizer(),
            clip_encoder(CLIPTextModelWithProjection, 8, 2), clip_tokenizer(),
            third if t5 else None, T5TokenizerFast(vocab=pieces, model_max_length=512) if t5 else None,
        )
    )  # fmt: skip


def unconditional() -> LDMPipeline:
    """LDM-CelebA-HQ and LDM-FFHQ: a VQ model, no text."""
    torch.manual_seed(4)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    autoencoder = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, num_vq_embeddings=64, latent_channels=3,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
    return quiet(LDMPipeline(autoencoder, network, scheduler))


def small_decoder() -> AutoencoderTiny:
    """In the place of TAESD."""
    torch.manual_seed(5)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, upsampling_scaling_factor=2,
    )  # fmt: skip


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


KINDS = {
    "sd": stable_diffusion,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "ldm": unconditional,
}
