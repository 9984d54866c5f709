"""What makes a backbone fast leaves its images as they are, but for rounding."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.backbones.device import precision_on
from stages.backbones.diffusion import model
from stages.backbones.diffusion.load import load_backbone
from stages.backbones.diffusion.model import compile_networks, slice_of
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import Sampler
from stages.memory import EVERYTHING, NOTHING, Memory
from stages.sampling import denoise

CPU = torch.device("cpu")


def noise(batch, backbone, seed=0):
    return torch.randn(batch, *backbone.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_the_memory_layout_changes_rounding_alone(tangram):
    """Against the bare networks, whose tensors have their channels first."""
    z_BCHW, text = noise(2, tangram), tangram.embed(["a ring"]).expand(2)
    with torch.no_grad():
        bare = tangram.denoiser(z_BCHW, torch.tensor([300, 300]), text.tokens_BLD).sample
        torch.testing.assert_close(tangram.predict(z_BCHW, 300, text), bare, rtol=0, atol=2e-5)
        bare = tangram.vae.decode(z_BCHW / tangram.vae.config.scaling_factor).sample
        image_B3hw = tangram.decode(z_BCHW)
        torch.testing.assert_close(image_B3hw, bare, rtol=0, atol=2e-5)
        bare = tangram.vae.encode(image_B3hw).latent_dist.mean * tangram.vae.config.scaling_factor
        latent_BCHW = tangram.encode(image_B3hw)
        torch.testing.assert_close(latent_BCHW, bare, rtol=0, atol=2e-5)
    for made in (image_B3hw, latent_BCHW, tangram.predict(z_BCHW, 300, text)):
        assert made.is_contiguous()  # what methods do with it has one layout, and so one rounding


def test_decoding_in_slices_changes_rounding_alone(tangram, monkeypatch):
    z_BCHW = noise(6, tangram)
    with torch.no_grad():
        whole = tangram.decode(z_BCHW)
        monkeypatch.setattr(model, "DECODED_PIXELS", 4 * tangram.image_size**2)
        decode, sizes = tangram.vae.decode, []
        monkeypatch.setattr(tangram.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
        sliced = tangram.decode(z_BCHW)
        turned = tangram.decode(z_BCHW.flip(0)).flip(0)
    assert sizes[:2] == [3, 3]
    torch.testing.assert_close(sliced, whole, rtol=0, atol=2e-5)
    assert torch.equal(turned, sliced)  # no row's bits depend on its slot


@given(st.integers(1, 200), st.integers(0, 200))
def test_a_slice_divides_its_batch_and_keeps_the_limit(batch, limit):
    rows = slice_of(batch, limit)
    assert batch % rows == 0
    assert rows <= max(limit, 1)
    assert not any(batch % more == 0 for more in range(rows + 1, min(batch, limit) + 1))


def test_half_precision_leaves_the_image(tangram):
    """bfloat16, 20 steps, guidance 4: above 30 dB of float32 (37 to 57 dB in a trial of eight images)."""
    half = load_backbone(BackboneSettings(dtype="bfloat16"), CPU)
    assert half.dtype == torch.bfloat16
    z_BCHW = noise(1, tangram)
    with torch.no_grad():
        one, other = (
            backbone.decode(denoise(backbone, z_BCHW, "a ring", Sampler(20, 4.0))).clamp(-1, 1)
            for backbone in (tangram, half)
        )
    assert 30 < 10 * math.log10(4 / float((one - other).square().mean())) < 80


def test_a_cpu_computes_in_full_precision_and_uncompiled(tangram):
    assert precision_on(CPU) == torch.float32
    assert tangram.dtype == torch.float32
    assert tangram.denoiser._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_change_rounding_alone(load_tiny):
    """Values and gradients; and what a process saw before does not decide the bits."""
    backbone = load_tiny()
    text = backbone.embed(["a cat"])

    def predicted(batch, memory=EVERYTHING):
        z_BCHW = noise(batch, backbone).requires_grad_()
        output_BCHW = memory.run(backbone.predict, z_BCHW, 300, text.expand(batch))
        return output_BCHW.detach(), *torch.autograd.grad(output_BCHW.square().sum(), z_BCHW)

    bare = {batch: predicted(batch) for batch in (1, 2, 4)}
    with torch.no_grad():
        image_B3hw = backbone.decode(noise(2, backbone))
    try:
        compile_networks(backbone.denoiser, backbone.vae.decoder)
        compiled = {batch: predicted(batch) for batch in (1, 2, 4)}
        for batch, made in compiled.items():
            torch.testing.assert_close(made, bare[batch], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(backbone.decode(noise(2, backbone)), image_B3hw, rtol=0, atol=1e-4)
        torch._dynamo.reset()
        for batch in (4, 1, 2):
            assert all(map(torch.equal, predicted(batch), compiled[batch]))
        for memory in (Memory(2**40), NOTHING):  # measured and kept, and run again
            assert all(map(torch.equal, predicted(2, memory), compiled[2]))
            assert memory.kept > 0 or memory is NOTHING
    finally:  # the model is that of other tests as well
        backbone.denoiser._compiled_call_impl = backbone.vae.decoder._compiled_call_impl = None
        torch._dynamo.reset()
