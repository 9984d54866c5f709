"""The random models have the published sizes, and are drawn with like any other."""

from __future__ import annotations

import pytest
import torch

from jobs.benchmarks.models import SHAPES, Shape, model
from schemas.errors import UserError
from stages.contract import Sampler
from stages.sampling import denoise

# millions of the denoiser: model cards and papers; of SD3 the released weights of the 2B transformer
PUBLISHED = {"sd15": 859.5, "sd21": 865.9, "sd21-768": 865.9, "sdxl": 2567.5, "sd3": 2028.3}


def _millions(network: torch.nn.Module) -> float:
    return sum(weight.numel() for weight in network.parameters()) / 1e6


@pytest.mark.parametrize("name", SHAPES)
def test_has_the_published_size(name: str) -> None:
    made = model(name, torch.device("meta"), torch.bfloat16)

    assert _millions(made.denoiser) == pytest.approx(PUBLISHED[name], abs=0.1)
    assert _millions(made.vae) == pytest.approx(83.7, abs=0.2)
    assert made.image_size == {"sd21-768": 768, "sdxl": 1024, "sd3": 1024}.get(name, 512)
    assert made.dtype == torch.bfloat16


SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TINY = {
    "sd": Shape(
        "sd",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        (5, 16, None),
        SMALL,
    ),
    "sdxl": Shape(
        "sdxl",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 + 6 * 8,
        },
        (5, 16, 8),
        SMALL,
    ),
    "sd3": Shape(
        "sd3",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
        },
        (5, 16, 8),
        SMALL,
        {"shift": 3.0},
    ),
}


def test_draws_images_that_depend_on_the_prompt() -> None:
    made = model("sd", torch.device("cpu"), torch.float32, TINY)
    z = torch.randn(2, *made.latent_shape, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        one, other = (made.decode(denoise(made, z, prompt, Sampler(2, 3.0))) for prompt in ("a", "b"))

    assert one.shape == (2, 3, 16, 16)
    assert torch.isfinite(one).all()
    assert not torch.equal(one, other)


def test_unknown_name_says_what_is_allowed() -> None:
    with pytest.raises(UserError, match="no model 'sd5'; allowed: tangram, sd15"):
        model("sd5", torch.device("cpu"), torch.float32)
