"""The loss of a seed and its gradients: against finite differences, autograd and closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stages.contract import Sampler, Text
from stages.memory import EVERYTHING, NOTHING, Memory
from stages.refine import seed_loss
from stages.refine.seed_loss import OMEGA, Likeness, drawn, loss_of, predicted
from stages.refine.views import ITSELF, View, draw_views
from stages.sampling import add_noise, condition, denoise

SAMPLER = Sampler(steps=4, guidance=3.0)
D = torch.float64


def noise(*shape, seed=0):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def likeness(clip, latent_CHW, semantic=10.0, appearance=1.0):
    return Likeness(clip, noise(5, seed=1), latent_CHW, semantic, appearance)


@pytest.fixture
def problem(double_backbone, simple_models):
    """The loss of seeds by each kind of gradient: latents by `drawn` or `predicted` through so many steps."""
    clip = simple_models(16).clip("")

    def loss(z_BCHW, latents_of=drawn, steps=SAMPLER.steps, memory=EVERYTHING, views=ITSELF, **weights):
        asked = condition(double_backbone, "a cat", SAMPLER.guidance, len(z_BCHW))
        latents = latents_of(double_backbone, z_BCHW, asked, SAMPLER, steps, memory=memory)
        latents = [latents] if latents_of is predicted else latents
        like = likeness(clip, noise(4, 8, 8, seed=2), **weights)
        return loss_of(double_backbone, latents, like, views, memory=memory)

    return loss


def gradient(loss, z_BCHW, **settings):
    z_BCHW = z_BCHW.clone().requires_grad_()
    return torch.autograd.grad(loss(z_BCHW, **settings).sum(), z_BCHW)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"semantic": 1.0, "appearance": 0.0},
        {"semantic": 0.0},
        {"latents_of": predicted, "steps": 1},
        {"latents_of": predicted, "steps": 2},
    ],
)
def test_gradient_equals_finite_differences(problem, settings):
    z_BCHW = noise(2, 4, 8, 8)
    exact_BCHW = gradient(problem, z_BCHW, **settings)
    assert exact_BCHW.flatten(1).norm(dim=1).min() > 1e-3
    for seed in range(2):
        direction_BCHW = F.normalize(noise(2, 4, 8, 8, seed=10 + seed).flatten(1)).view_as(z_BCHW)
        with torch.no_grad():
            step = 1e-5 * direction_BCHW
            numeric_B = (problem(z_BCHW + step, **settings) - problem(z_BCHW - step, **settings)) / 2e-5
        along_B = (exact_BCHW * direction_BCHW).sum(dim=(1, 2, 3))
        torch.testing.assert_close(numeric_B, along_B, rtol=1e-4, atol=1e-7)


KINDS = [{}, {"steps": 2}, {"latents_of": predicted, "steps": 1}]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_has_the_same_bits_whatever_is_kept(problem, kind):
    z_BCHW = noise(3, 4, 8, 8)
    plain = gradient(problem, z_BCHW, **kind)
    whole = Memory(2**40)
    assert torch.equal(gradient(problem, z_BCHW, memory=whole, **kind), plain)
    for memory in (Memory(whole.kept), Memory(whole.kept // 2), NOTHING):
        assert torch.equal(gradient(problem, z_BCHW, memory=memory, **kind), plain)
        assert memory.kept < whole.kept


def test_on_real_models_it_has_the_same_bits_as_well(backbone, models):
    """In float32, with tangram's CLIP model, in two views of each row."""
    clip, size = models.clip("tangram"), backbone.image_size
    clip_E = clip.encode_text(["a photo of a star"])[0]
    like = Likeness(clip, clip_E, noise(*backbone.latent_shape, seed=1).float(), 10.0, 1.0)
    z_BCHW, asked = noise(2, *backbone.latent_shape).float(), condition(backbone, "a star", 2.0, 2)
    streams = [np.random.default_rng(row) for row in range(2)]
    views = draw_views(streams, 2, 0.1, size, z_BCHW)

    def loss(z_BCHW, memory):
        latents = drawn(backbone, z_BCHW, asked, Sampler(3, 2.0), 3, memory=memory)
        return loss_of(backbone, latents, like, views, memory=memory)

    whole = Memory(2**40)
    kept = gradient(loss, z_BCHW, memory=whole)
    some = Memory(whole.kept // 2)
    assert torch.equal(gradient(loss, z_BCHW, memory=some), kept)
    assert 0 < some.kept < whole.kept
    assert torch.equal(gradient(loss, z_BCHW, memory=NOTHING), kept)


def test_slices_of_a_batch_are_decoded_by_themselves_and_keep_their_rows_views(
    problem, double_backbone, monkeypatch
):
    z_BCHW, sizes, decode = noise(6, 4, 8, 8), [], double_backbone.vae.decode
    monkeypatch.setattr(double_backbone.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    streams = [np.random.default_rng(row) for row in range(6)]
    kind = {"views": draw_views(streams, 2, 0.1, 16, z_BCHW), "latents_of": predicted, "steps": 1}
    whole_B, whole = problem(z_BCHW, **kind), gradient(problem, z_BCHW, **kind)
    assert sizes == [6, 6]
    monkeypatch.setattr(seed_loss, "LOSS_PIXELS", 4 * 16 * 16)
    torch.testing.assert_close(problem(z_BCHW, **kind), whole_B, rtol=1e-12, atol=0)
    assert sizes[2:] == [3, 3]  # the most that is allowed and divides the batch
    torch.testing.assert_close(gradient(problem, z_BCHW, **kind), whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_have_the_gradients_of_single_seeds(problem, kind):
    z_BCHW = noise(3, 4, 8, 8)
    alone = torch.cat([gradient(problem, z_CHW[None], **kind) for z_CHW in z_BCHW])
    torch.testing.assert_close(gradient(problem, z_BCHW, **kind), alone, rtol=1e-10, atol=1e-12)


def test_the_loss_is_the_papers(problem, double_backbone, simple_models):
    """Written out: the decoded latents after the last three steps, and the last latent itself."""
    z_BCHW, latents = noise(2, 4, 8, 8), []
    with torch.no_grad():
        denoise(double_backbone, z_BCHW, "a cat", SAMPLER, callback=lambda k, z: latents.append(z))
        clip, clip_E = simple_models(16).clip(""), noise(5, seed=1)
        expected_B = ((latents[3] - noise(4, 8, 8, seed=2)) ** 2).mean(dim=(1, 2, 3))
        for omega, z_j in zip((0.05, 0.25, 0.7), latents[1:], strict=True):
            features_BE = clip.encode_image(double_backbone.decode(z_j))
            cosine_B = features_BE @ clip_E / features_BE.norm(dim=1) / clip_E.norm()
            expected_B += 10 * omega * (1 - cosine_B)
        torch.testing.assert_close(problem(z_BCHW), expected_B)
        # whatever part of it is differentiated
        torch.testing.assert_close(problem(z_BCHW, steps=1), expected_B)
    assert sum(OMEGA) == pytest.approx(1)


def test_truncated_to_all_steps_is_autograd_through_the_sampler(problem, double_backbone):
    def plain(z_BCHW):
        z0_BCHW = denoise(double_backbone, z_BCHW, "a cat", SAMPLER)
        return (z0_BCHW - noise(4, 8, 8, seed=2)).square().mean(dim=(1, 2, 3))

    z_BCHW = noise(2, 4, 8, 8)
    truncated = gradient(problem, z_BCHW, steps=SAMPLER.steps, semantic=0.0)
    torch.testing.assert_close(truncated, gradient(plain, z_BCHW), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 3])
def test_truncated_is_the_gradient_at_the_latents_where_it_begins(problem, double_backbone, steps):
    """The early steps count as the identity, and the scored latents among them are constants."""
    z_BCHW = noise(2, 4, 8, 8)
    first = SAMPLER.steps - steps
    with torch.no_grad():
        middle_BCHW = denoise(double_backbone, z_BCHW, "a cat", SAMPLER, last=first)

    def late(z_BCHW):
        z0_BCHW = denoise(double_backbone, z_BCHW, "a cat", SAMPLER, first=first)
        return (z0_BCHW - noise(4, 8, 8, seed=2)).square().mean(dim=(1, 2, 3))

    truncated = gradient(problem, z_BCHW, steps=steps, semantic=0.0)
    torch.testing.assert_close(truncated, gradient(late, middle_BCHW), rtol=1e-10, atol=1e-14)
    exact = gradient(problem, z_BCHW, semantic=0.0)
    assert (truncated / truncated.norm() - exact / exact.norm()).norm() > 1e-3


def test_one_step_on_gaussian_data_has_the_closed_gradient(gaussian_backbone, simple_models):
    """There x̂0 = E[x_0 | z_T] = μ + s²√ᾱ·(z − √ᾱμ) / (ᾱs² + 1 − ᾱ), and every derivative is one number."""
    backbone, sampler = gaussian_backbone(mean=0.7, deviation=0.4), Sampler(10, 1.0)
    z_BCHW, latent_CHW = noise(2, 4, 4, 4), noise(4, 4, 4, seed=2)
    asked = condition(backbone, "", 1.0, 2)
    a = backbone.schedule.path(10).levels[0].signal ** 2
    slope = 0.4**2 * a**0.5 / (a * 0.4**2 + 1 - a)
    x0_BCHW = 0.7 + slope * (z_BCHW - a**0.5 * 0.7)
    torch.testing.assert_close(predicted(backbone, z_BCHW, asked, sampler, 1), x0_BCHW)

    like = likeness(simple_models(4).clip(""), latent_CHW, semantic=0.0)
    found = gradient(lambda z: loss_of(backbone, [predicted(backbone, z, asked, sampler, 1)], like), z_BCHW)
    torch.testing.assert_close(found, 2 / 64 * (x0_BCHW - latent_CHW) * slope)


@pytest.mark.parametrize(("calls", "places"), [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 5, 7])])
def test_calls_are_spread_over_the_samplers_path_with_ddim_steps_between(gaussian_backbone, calls, places):
    """Written out: x̂0 and ε at each place, noised to the level of the next one; x̂0 at the last."""
    backbone, asked_at = gaussian_backbone(), []
    predict = backbone.predict
    backbone.predict = lambda z, t, text: (asked_at.append(t), predict(z, t, text))[1]
    path = backbone.schedule.path(10)
    z_BCHW = noise(1, 4, 4, 4)
    x0_BCHW = predicted(backbone, z_BCHW, condition(backbone, "", 1.0, 1), Sampler(10, 1.0), calls)
    assert asked_at == [path.times[place] for place in places]
    text = Text(torch.zeros(1, 1, 1, dtype=D))
    for place, following in pairwise(places):
        level = path.levels[place]
        epsilon = predict(z_BCHW, path.times[place], text)
        clean = (z_BCHW - level.noise * epsilon) / level.signal
        z_BCHW = add_noise(clean, epsilon, path.levels[following])
    level = path.levels[places[-1]]
    epsilon = predict(z_BCHW, path.times[places[-1]], text)
    torch.testing.assert_close(x0_BCHW, (z_BCHW - level.noise * epsilon) / level.signal)


def test_views_are_averaged(gaussian_backbone, simple_models):
    backbone = gaussian_backbone()
    like = likeness(simple_models(4).clip(""), noise(4, 4, 4), appearance=0.0)
    latents = [noise(2, 4, 4, 4, seed=3)]
    views = [View(), View(noise_B3SS=noise(2, 3, 4, 4, seed=4)), View(noise_B3SS=noise(2, 3, 4, 4, seed=5))]
    each = torch.stack([loss_of(backbone, latents, like, [view]) for view in views])
    torch.testing.assert_close(loss_of(backbone, latents, like, views), each.mean(dim=0))
    assert (each[1] - each[2]).abs().min() > 1e-3
    features_BE = like.clip.encode_image(backbone.decode(latents[0]))  # the one latent has the whole weight
    torch.testing.assert_close(each[0], 10 * (1 - F.cosine_similarity(features_BE, like.clip_E[None])))
