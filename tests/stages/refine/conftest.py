"""A CLIP and a classifier that can be written out, and the tiny network in float64."""

import pytest
import torch

from stages.backbones.diffusion.model import StableDiffusion
from stages.backbones.diffusion.text import TextEncoder
from stages.backbones.models import LoadedModels
from stages.schedule import Diffusion


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class LinearClip:
    """Features that are a fixed linear function of the pixels, in the precision of the pixels."""

    fingerprint, logit_scale = "linear", 1.0

    def __init__(self, side):
        self.matrix = noise(3 * side * side, 5, seed=9, dtype=torch.float64)

    def encode_image(self, image_B3hw):
        return image_B3hw.flatten(1) @ self.matrix.to(image_B3hw.dtype)

    def encode_text(self, texts):
        raise NotImplementedError


class BrightOrDark:
    """A classifier of two classes: the mean of an image's pixels decides."""

    fingerprint, classes = "brightness", ("bright", "dark")

    def logits(self, image_B3hw):
        mean_B = image_B3hw.mean(dim=(1, 2, 3))
        return 20 * torch.stack([mean_B, -mean_B], dim=1)


class SimpleModels(LoadedModels):
    """A worker's models, with these two as its CLIP and its classifier."""

    def __init__(self, side):
        self._simple = LinearClip(side)

    def clip(self, model):
        return self._simple

    def classifier(self, model):
        return BrightOrDark()

    def classes(self, model):
        return BrightOrDark.classes


@pytest.fixture
def simple_models():
    """Of a backbone's image size."""
    return SimpleModels


@pytest.fixture(scope="session")
def double_backbone(tiny_pipeline, tiny_folder):
    """The tiny network, v-predicting, in float64, so that finite differences mean something."""
    folder = tiny_folder(prediction_type="v_prediction")
    double = type(tiny_pipeline).from_pretrained(folder, dtype=torch.float64, safety_checker=None)
    encoder = TextEncoder(double.text_encoder, double.tokenizer, "last", 12, "double")
    config = double.scheduler.config
    return StableDiffusion(
        denoiser=double.unet,
        vae=double.vae,
        encoders=[encoder],
        schedule=Diffusion(config.prediction_type, double.scheduler.alphas_cumprod, config),
        fingerprint="double",
        device=torch.device("cpu"),
        what="double",
    )
