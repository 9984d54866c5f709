"""Small real models for the tests: a Stable Diffusion of a few thousand weights, and one solved exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from tests.reference_files import bad_files, photographs, png  # noqa: F401  fixtures

torch.set_num_threads(1)

# Annotated shapes are checked in every call that a test makes.
METHODS = (
    "sampling",
    "gaussianity",
    "backbones",
    "invert",
    "combine",
    "refine",
    "generate",
    "filter",
    "measure",
)
install_import_hook([f"stages.{name}" for name in METHODS], "beartype.beartype")


@pytest.fixture(scope="session")
def tiny_pipeline():
    """An untrained diffusers pipeline: 16×16 images, 4×8×8 latents, 12 tokens a prompt."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: n for n, p in enumerate(pieces)}, merges=[], model_max_length=12)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=12,
            bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, scaling_factor=0.9,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory):
    """The pipeline saved with given scheduler settings: `tiny_folder(prediction_type="v_prediction")`."""
    plain = tmp_path_factory.mktemp("tiny") / "plain"
    tiny_pipeline.save_pretrained(plain)
    made: dict[tuple, Path] = {}

    def folder(**scheduler) -> Path:
        key = tuple(sorted(scheduler.items()))
        if key not in made:
            made[key] = shutil.copytree(plain, plain.with_name(f"variation{len(made)}"))
            type(tiny_pipeline.scheduler).from_config(
                tiny_pipeline.scheduler.config, **scheduler
            ).save_pretrained(made[key] / "scheduler")
        return made[key]

    return folder


@pytest.fixture(scope="session")
def load_tiny(tiny_folder):
    """The same, loaded by our loader."""
    from stages.backbones.latent_diffusion import BackboneSettings, load_backbone

    made: dict[tuple, object] = {}

    def load(**scheduler):
        key = tuple(sorted(scheduler.items()))
        if key not in made:
            settings = BackboneSettings(model=str(tiny_folder(**scheduler)))
            made[key] = load_backbone(settings, torch.device("cpu"))
        return made[key]

    return load


@pytest.fixture(scope="session")
def tangram():
    from stages.backbones.latent_diffusion import BackboneSettings, load_backbone

    return load_backbone(BackboneSettings(), torch.device("cpu"))


@pytest.fixture(scope="session", params=["tiny", "tangram"])
def backbone(request):
    """Each of the two backbones that a test of behaviour should hold for."""
    return (
        request.getfixturevalue("load_tiny")()
        if request.param == "tiny"
        else request.getfixturevalue("tangram")
    )


@pytest.fixture(scope="session")
def models():
    from stages.backbones.models import LoadedModels

    return LoadedModels(torch.device("cpu"))


class GaussianBackbone:
    """The exact denoiser of data x_0 ~ N(mean, deviation²·I); its probability flow has a closed solution.

    The embedding of a prompt is its length, which shifts the mean, so that guidance has something to do.
    """

    fingerprint = "gaussian"
    latent_shape = (4, 4, 4)
    image_size = 4
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, prediction_type="epsilon", spacing="trailing", mean=0.7, deviation=0.4):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.final_alpha_cumprod = float(self.alphas_cumprod[0])
        self.prediction_type, self.timestep_spacing, self.steps_offset = prediction_type, spacing, 1
        self.mean, self.deviation = mean, deviation
        self.batches: list[int] = []

    def embed(self, prompts):
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts], dtype=torch.float64)

    def embed_words(self, prompt, words):
        """A word shifts the mean by its one coordinate."""
        return self.embed([prompt]) + sum(vector_BD[:, None, :] for vector_BD in words.values())

    def word(self, text):
        return torch.zeros(1, dtype=torch.float64) if text is None else torch.ones(1, dtype=torch.float64)

    def predict(self, z_BCHW, t, text_BLD):
        self.batches.append(len(z_BCHW))
        a = float(self.alphas_cumprod[t])
        mean_B111 = self.mean + 0.01 * text_BLD[:, :, :, None]
        variance = a * self.deviation**2 + 1 - a
        epsilon = (1 - a) ** 0.5 * (z_BCHW - a**0.5 * mean_B111) / variance
        if self.prediction_type == "epsilon":
            return epsilon
        return (epsilon - (1 - a) ** 0.5 * z_BCHW) / a**0.5  # v = (ε − √(1−ᾱ)·z) / √ᾱ

    def transport(self, z_BCHW, start, end, prompt=""):
        """Along the probability flow from ᾱ = start to ᾱ = end: quantiles stay quantiles."""
        mean = self.mean + 0.01 * len(prompt)
        width = [(a * self.deviation**2 + 1 - a) ** 0.5 for a in (start, end)]
        return end**0.5 * mean + (z_BCHW - start**0.5 * mean) * width[1] / width[0]

    def encode(self, image_B3hw):
        return torch.cat([image_B3hw, image_B3hw[:, :1]], dim=1).double()

    def decode(self, z_BCHW):
        return z_BCHW[:, :3]


@pytest.fixture(scope="session")
def gaussian_backbone():
    return GaussianBackbone
