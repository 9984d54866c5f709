"""Small real models for the tests: a Stable Diffusion of a few thousand weights, and one solved exactly."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  the import hook looks for it by name
from tests.reference_files import bad_files, photographs, png  # noqa: F401  fixtures

torch.set_num_threads(1)

# Annotated shapes are checked in every call that a test makes.
METHODS = (
    "sampling",
    "memory",
    "schedule",
    "gaussianity",
    "backbones",
    "invert",
    "combine",
    "refine",
    "generate",
    "filter",
    "measure",
)
install_import_hook([f"stages.{name}" for name in METHODS], "tests.typechecker.check")


@pytest.fixture(scope="session")
def tiny_pipeline():
    """An untrained diffusers pipeline: 16×16 images, 4×8×8 latents, 12 tokens a prompt."""
    from tests.tiny_models import stable_diffusion

    return stable_diffusion()


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
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings

    made: dict[tuple, object] = {}

    def load(**scheduler):
        key = tuple(sorted(scheduler.items()))
        if key not in made:
            settings = BackboneSettings(model=str(tiny_folder(**scheduler)))
            made[key] = load_backbone(settings, torch.device("cpu"))
        return made[key]

    return load


@pytest.fixture(scope="session")
def kind_of_model(tmp_path_factory):
    """A tiny model of each kind: its diffusers pipeline, the folder it was saved to, and our backbone."""
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings
    from tests.tiny_models import KINDS

    @cache
    def made(kind):
        pipeline, folder = KINDS[kind](), tmp_path_factory.mktemp("kinds") / kind
        pipeline.save_pretrained(folder)
        return pipeline, folder, load_backbone(BackboneSettings(model=str(folder)), torch.device("cpu"))

    return made


@pytest.fixture(scope="session")
def tangram():
    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings

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
        from stages.schedule import Diffusion, Flow

        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        config = {"timestep_spacing": spacing, "steps_offset": 1, "set_alpha_to_one": False}
        self.schedule = (
            Flow(shift=1.5)
            if prediction_type == "flow"
            else Diffusion(prediction_type, torch.cumprod(1 - betas, dim=0), config)
        )
        self.mean, self.deviation = mean, deviation
        self.batches: list[int] = []

    def embed(self, prompts):
        from stages.contract import Text

        return Text(torch.tensor([[[float(len(prompt))]] for prompt in prompts], dtype=torch.float64))

    def embed_words(self, prompt, words):
        """A word shifts the mean by its one coordinate."""
        shift_B1D = sum(vector_BD[:, None, :] for vector_BD in words.values())
        return self.embed([prompt]).map(lambda text_BLD: text_BLD + shift_B1D)

    def word(self, text):
        return torch.zeros(1, dtype=torch.float64) if text is None else torch.ones(1, dtype=torch.float64)

    def predict(self, z_BCHW, t, text):
        from stages.sampling import output_of

        self.batches.append(len(z_BCHW))
        level = self.schedule.level(t)
        mean_B111 = self.mean + 0.01 * text.tokens_BLD[:, :, :, None]
        away_BCHW = (z_BCHW - level.signal * mean_B111) / self._width(level) ** 2
        x0_BCHW = mean_B111 + level.signal * self.deviation**2 * away_BCHW
        return output_of(x0_BCHW, level.noise * away_BCHW, level, self.schedule.prediction)

    def _width(self, level):
        return (level.signal**2 * self.deviation**2 + level.noise**2) ** 0.5

    def transport(self, z_BCHW, start, end, prompt=""):
        """Along the probability flow from one noise level to another: quantiles stay quantiles."""
        mean, width = self.mean + 0.01 * len(prompt), self._width(end) / self._width(start)
        return end.signal * mean + (z_BCHW - start.signal * mean) * width

    def encode(self, image_B3hw):
        return torch.cat([image_B3hw, image_B3hw[:, :1]], dim=1).double()

    def decode(self, z_BCHW):
        return z_BCHW[:, :3]


@pytest.fixture(scope="session")
def gaussian_backbone():
    return GaussianBackbone
