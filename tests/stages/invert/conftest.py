"""A schedule that begins in pure noise, for the solved model, and noise."""

import pytest
import torch


@pytest.fixture(scope="session")
def pure_noise_backbone(gaussian_backbone):
    """The solved model as a v-model, its schedule rescaled to ᾱ = 0 at the end (arXiv:2305.08891, §3.1)."""

    class PureNoise(gaussian_backbone):
        def __init__(self):
            super().__init__("v_prediction")
            roots = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()

        def predict(self, z_BCHW, t, text_BLD):
            a = float(self.alphas_cumprod[t])
            mean_B111 = self.mean + 0.01 * text_BLD[:, :, :, None]
            spread_BCHW = (z_BCHW - a**0.5 * mean_B111) / (a * self.deviation**2 + 1 - a)
            x0_BCHW = mean_B111 + a**0.5 * self.deviation**2 * spread_BCHW
            return a**0.5 * (1 - a) ** 0.5 * spread_BCHW - (1 - a) ** 0.5 * x0_BCHW

    return PureNoise


@pytest.fixture(scope="session")
def noise():
    def noise(*shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    return noise
