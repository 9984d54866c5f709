"""SeedSelect: its gradient, its optimiser, its artifact, and the independence of its rows."""

import math

import pytest
import torch
import torch.nn.functional as F

from jobs.tangram.drawings import draw, generator
from schemas.errors import UserError
from stages.backbones.latent_diffusion import COMPONENTS, LatentDiffusion
from stages.backbones.models import LoadedModels
from stages.contract import Sampler
from stages.images import to_tensor
from stages.refine.seedselect import OMEGA, SeedSelect, seed_loss
from stages.sampling import denoise

SAMPLER = Sampler(steps=4, guidance=3.0)


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


class OneClip(LoadedModels):
    """A worker's models, with the linear one as its CLIP."""

    def __init__(self, clip):
        self._linear = clip

    def clip(self, model):
        return self._linear


@pytest.fixture(scope="module")
def double_backbone(tiny_pipeline, tiny_folder):
    """The tiny network, v-predicting, in float64, so that finite differences mean something."""
    folder = tiny_folder(prediction_type="v_prediction")
    double = type(tiny_pipeline).from_pretrained(folder, dtype=torch.float64, safety_checker=None)
    parts = {name: getattr(double, name) for name in COMPONENTS}
    return LatentDiffusion(**parts, fingerprint="double", device=torch.device("cpu"), what="double")


@pytest.fixture
def problem(double_backbone):
    """Loss of seeds towards given features and latent, with or without checkpointing."""
    clip_E, latent_CHW = noise(5, seed=1, dtype=torch.float64), noise(4, 8, 8, seed=2, dtype=torch.float64)
    clip = LinearClip(double_backbone.image_size)

    def loss(z_BCHW, checkpoint=False, semantic=10.0, appearance=1.0):
        return seed_loss(
            double_backbone, clip, z_BCHW, "a cat", SAMPLER, clip_E, latent_CHW,
            semantic=semantic, appearance=appearance, checkpoint=checkpoint,
        )  # fmt: skip

    return loss


def gradient(loss, z_BCHW, **settings):
    z_BCHW = z_BCHW.clone().requires_grad_()
    return torch.autograd.grad(loss(z_BCHW, **settings).sum(), z_BCHW)[0]


@pytest.mark.parametrize(("semantic", "appearance"), [(10.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_equals_finite_differences(problem, semantic, appearance, checkpoint):
    weights = {"semantic": semantic, "appearance": appearance}
    z_BCHW = noise(2, 4, 8, 8, dtype=torch.float64)
    exact_BCHW = gradient(problem, z_BCHW, checkpoint=checkpoint, **weights)
    assert exact_BCHW.flatten(1).norm(dim=1).min() > 1e-3
    for seed in range(3):
        direction_BCHW = F.normalize(
            noise(2, 4, 8, 8, seed=10 + seed, dtype=torch.float64).flatten(1)
        ).view_as(z_BCHW)
        with torch.no_grad():
            step = 1e-5 * direction_BCHW
            numeric_B = (problem(z_BCHW + step, **weights) - problem(z_BCHW - step, **weights)) / 2e-5
        along_B = (exact_BCHW * direction_BCHW).sum(dim=(1, 2, 3))
        torch.testing.assert_close(numeric_B, along_B, rtol=1e-5, atol=1e-8)


def test_checkpointed_is_plain_backward(problem):
    z_BCHW = noise(3, 4, 8, 8, dtype=torch.float64)
    plain, checkpointed = (gradient(problem, z_BCHW, checkpoint=flag) for flag in (False, True))
    torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)


def test_the_loss_is_the_papers(problem, double_backbone):
    """Written out: the decoded latents after the last three steps, and the last latent itself."""
    z_BCHW, latents = noise(2, 4, 8, 8, dtype=torch.float64), []
    with torch.no_grad():
        denoise(double_backbone, z_BCHW, "a cat", SAMPLER, callback=lambda k, z: latents.append(z))
        clip = LinearClip(double_backbone.image_size)
        clip_E, latent_CHW = (
            noise(5, seed=1, dtype=torch.float64),
            noise(4, 8, 8, seed=2, dtype=torch.float64),
        )
        expected_B = ((latents[3] - latent_CHW) ** 2).mean(dim=(1, 2, 3))
        for omega, z_j in zip((0.05, 0.25, 0.7), latents[1:], strict=True):
            features_BE = clip.encode_image(double_backbone.decode(z_j))
            cosine_B = features_BE @ clip_E / features_BE.norm(dim=1) / clip_E.norm()
            expected_B += 10 * omega * (1 - cosine_B)
        torch.testing.assert_close(problem(z_BCHW), expected_B)
    assert sum(OMEGA) == pytest.approx(1)


def test_rows_of_a_batch_have_the_gradients_of_single_seeds(problem):
    z_BCHW = noise(3, 4, 8, 8, dtype=torch.float64)
    alone = torch.cat([gradient(problem, z_CHW[None]) for z_CHW in z_BCHW])
    torch.testing.assert_close(gradient(problem, z_BCHW), alone, rtol=1e-10, atol=1e-12)


def refine(backbone, clip, z_BCHW, artifact, sampler=SAMPLER, prompt="a cat", **settings):
    method = SeedSelect(SeedSelect.Config(**settings))
    return method(backbone, OneClip(clip), z_BCHW, prompt, sampler, artifact)


@pytest.fixture
def artifact():
    return {
        "clip_E": noise(5, seed=1, dtype=torch.float64),
        "latent_CHW": noise(4, 8, 8, seed=2, dtype=torch.float64),
    }


def test_the_optimiser_is_adamw_at_a_tenth_from_the_third_iteration_on(problem, double_backbone, artifact):
    """Loshchilov & Hutter, arXiv:1711.05101, written out on the same gradients."""
    z = start = noise(2, 4, 8, 8, dtype=torch.float64)
    first = second = torch.zeros_like(z)
    losses = []
    for iteration in range(5):
        losses.append(problem(z).detach())
        g = gradient(problem, z)
        lr = 0.05 if iteration < 3 else 0.005
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        unbiased = [
            moment / (1 - beta ** (iteration + 1)) for moment, beta in ((first, 0.9), (second, 0.999))
        ]
        z = z * (1 - lr * 0.01) - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    refined = refine(double_backbone, LinearClip(16), start, artifact)
    torch.testing.assert_close(refined.z_BCHW, z, rtol=0, atol=1e-7)
    losses.append(problem(z).detach())
    torch.testing.assert_close(
        torch.tensor(refined.losses).double(), torch.stack(losses, 1), rtol=1e-5, atol=0
    )


def test_the_loss_falls_on_a_real_model(tangram, models):
    drawn = [draw("octagon", generator("references", "octagon", i))[0] for i in range(3)]
    image_N3hw = torch.stack([to_tensor(image, 64) for image in drawn])
    method = SeedSelect(SeedSelect.Config(iterations=4))
    artifact = method.prepare(tangram, models, image_N3hw)
    start = noise(2, *tangram.latent_shape)
    refined = method(tangram, models, start, "a photo of a octagon", Sampler(4, 1.0), artifact)
    for losses in refined.losses:
        assert len(losses) == 5
        assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(refined.z_BCHW, start)
    assert not refined.z_BCHW.requires_grad


def test_a_row_knows_neither_its_neighbours_nor_its_slot(backbone, models):
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    method = SeedSelect(SeedSelect.Config(iterations=1))
    artifact = method.prepare(backbone, models, noise(2, 3, backbone.image_size, backbone.image_size))

    def run(*rows):
        return method(backbone, models, torch.stack(rows), "a red star", Sampler(3, 2.0), artifact)

    first, other = run(row_CHW, *others), run(*poisoned.flip(0), row_CHW)
    assert torch.equal(other.z_BCHW[3], first.z_BCHW[0])
    assert other.losses[3] == first.losses[0]
    assert all(math.isfinite(loss) for loss in first.losses[0])
    assert not torch.isfinite(other.z_BCHW[1]).any()
    assert all(math.isnan(loss) for loss in other.losses[1])


def test_norms_are_kept_when_asked(double_backbone, artifact):
    z_BCHW = noise(2, 4, 8, 8, dtype=torch.float64) * torch.tensor([1.0, 1.2])[:, None, None, None]
    before_B = z_BCHW.flatten(1).norm(dim=1)
    free = refine(double_backbone, LinearClip(16), z_BCHW, artifact, norm="free").z_BCHW
    kept = refine(double_backbone, LinearClip(16), z_BCHW, artifact, norm="keep").z_BCHW
    torch.testing.assert_close(kept.flatten(1).norm(dim=1), before_B)
    assert (free.flatten(1).norm(dim=1) - before_B).abs().min() > 1e-3


def test_it_works_inside_no_grad_and_leaves_its_input_alone(double_backbone, artifact):
    z_BCHW = noise(1, 4, 8, 8, dtype=torch.float64)
    before = z_BCHW.clone()
    with torch.no_grad():
        refined = refine(double_backbone, LinearClip(16), z_BCHW, artifact, iterations=1)
    assert torch.equal(z_BCHW, before)
    assert not torch.equal(refined.z_BCHW, before)


def test_the_artifact_is_the_mean_of_unnormalised_features_and_of_latents(load_tiny):
    backbone, clip = load_tiny(), LinearClip(16)
    image_N3hw = noise(3, 3, 16, 16) * torch.tensor([0.1, 0.2, 1.0])[:, None, None, None]
    artifact = SeedSelect(SeedSelect.Config()).prepare(backbone, OneClip(clip), image_N3hw)
    features_NE = clip.encode_image(image_N3hw)
    torch.testing.assert_close(artifact["clip_E"], F.normalize(features_NE.mean(0), dim=0))
    assert F.cosine_similarity(artifact["clip_E"], F.normalize(features_NE, dim=1).mean(0), dim=0) < 0.99
    with torch.no_grad():
        torch.testing.assert_close(artifact["latent_CHW"], backbone.encode(image_N3hw).mean(0))


def test_too_short_a_sampler_is_the_users_mistake(load_tiny, artifact):
    with pytest.raises(UserError, match=r"set generate\.steps to at least 3"):
        refine(load_tiny(), LinearClip(16), noise(1, 4, 8, 8), artifact, sampler=Sampler(2, 1.0))
