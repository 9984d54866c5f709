"""A schedule that begins in pure noise, for the solved model, and noise."""

import pytest
import torch


@pytest.fixture(scope="session")
def pure_noise_backbone(gaussian_backbone):
    """The solved model as a v-model, its schedule rescaled to ᾱ = 0 at the end (arXiv:2305.08891, §3.1)."""

    class PureNoise(gaussian_backbone):
        def __init__(self):
            super().__init__("v_prediction")
            roots = self.schedule.alphas_cumprod.sqrt()
            self.schedule.alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()

    return PureNoise


@pytest.fixture(scope="session")
def noise():
    def noise(*shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    return noise
