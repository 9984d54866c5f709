"""SeedSelect: its optimiser, when its rows stop and are moved, its artifact, the independence of its rows."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from jobs.tangram.drawings import draw, generator
from schemas.errors import UserError
from stages.contract import DUMMY, Chance, Material, Order, Sampler
from stages.images import to_tensor
from stages.memory import Memory
from stages.refine import seed_loss
from stages.refine.seed_loss import Likeness, drawn, loss_of
from stages.refine.seedselect import SeedSelect, descend
from stages.refine.stop import Plateau
from stages.sampling import condition, denoise

SAMPLER = Sampler(steps=4, guidance=1.0)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def material(image_N3hw):
    return Material(image_N3hw, "circle", "a photo of a circle", DUMMY)


@pytest.fixture
def refine(gaussian_backbone, simple_models):
    """SeedSelect on Gaussian data, where image and seed are bright together."""
    backbone, models = gaussian_backbone(mean=0.0), simple_models(4)

    def run(z_BCHW, latent=0.0, sampler=SAMPLER, indices=None, **settings):
        artifact = {
            "clip_E": noise(5, seed=1, dtype=torch.float64),
            "latent_CHW": torch.full((4, 4, 4), latent, dtype=torch.float64),
        }
        chances = [Chance(i, ("test",)) for i in indices or range(len(z_BCHW))]
        order = Order("", z_BCHW, target="bright", chances=chances, artifact=artifact)
        return SeedSelect(SeedSelect.Config(**settings))(backbone, models, order, sampler)

    return run


def test_the_optimiser_is_adamw_at_a_tenth_from_the_third_iteration_on(double_backbone, simple_models):
    """Loshchilov & Hutter, arXiv:1711.05101, written out on the same gradients."""
    z = start = noise(2, 4, 8, 8, dtype=torch.float64)
    models, latent_CHW = simple_models(16), noise(4, 8, 8, seed=2, dtype=torch.float64)
    artifact = {"clip_E": noise(5, seed=1, dtype=torch.float64), "latent_CHW": latent_CHW}
    like = Likeness(models.clip(""), **artifact, semantic=10.0, appearance=1.0)
    asked = condition(double_backbone, "a cat", 1.0, 2)

    def loss(z_BCHW):
        return loss_of(double_backbone, drawn(double_backbone, z_BCHW, asked, SAMPLER, 4), like)

    first = second = torch.zeros_like(z)
    losses = [loss(z).detach()]
    for iteration in range(5):
        z = z.detach().requires_grad_()
        losses.append(loss(z))
        (g,) = torch.autograd.grad(losses[-1].sum(), z)
        lr = 0.05 if iteration < 3 else 0.005
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        unbiased = [
            moment / (1 - beta ** (iteration + 1)) for moment, beta in ((first, 0.9), (second, 0.999))
        ]
        z = z * (1 - lr * 0.01) - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    losses.append(loss(z))
    refined = SeedSelect(SeedSelect.Config())(
        double_backbone, models, Order("a cat", start, artifact=artifact), SAMPLER
    )
    torch.testing.assert_close(refined.z_BCHW, z.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        torch.tensor(refined.losses).double(), torch.stack(losses, 1).detach(), rtol=1e-5, atol=0
    )


def test_the_loss_falls_on_a_real_model(tangram, models):
    drawings = [draw("octagon", generator("references", "octagon", i))[0] for i in range(2)]
    method = SeedSelect(SeedSelect.Config(iterations=4, lr=0.02))
    artifact = method.prepare(tangram, models, material(torch.stack([to_tensor(d, 64) for d in drawings])))
    start = noise(1, *tangram.latent_shape)
    order = Order("a photo of a octagon", start, artifact=artifact)
    refined = method(tangram, models, order, SAMPLER)
    for before, *followed, after in refined.losses:
        assert len(followed) == 4
        assert followed[0] == pytest.approx(before)
        assert after < 0.9 * before
    assert not torch.equal(refined.z_BCHW, start)
    assert not refined.z_BCHW.requires_grad


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient": "truncated", "gradient_steps": 2, "views": 2, "noise": 0.1},
        {"gradient": "one_step", "views": 3},
        {"stop": {"plateau": 0.0, "patience": 1}, "lr": 2.0, "iterations": 3, "gradient": "one_step"},
        {"stop": {"classifier": "tangram", "probability": 0.2}, "gradient": "one_step"},
        {"gradient": "one_step", "views": 2, "noise": 0.1, "sliced": True},
    ],
)
def test_a_row_knows_neither_its_neighbours_nor_its_slot(load_tiny, models, settings, monkeypatch):
    backbone, settings = load_tiny(), dict(settings)
    if settings.pop("sliced", False):
        monkeypatch.setattr(seed_loss, "LOSS_PIXELS", 2 * backbone.image_size**2)
    row_CHW, others = noise(*backbone.latent_shape), noise(3, *backbone.latent_shape, seed=1)
    poisoned = others.clone()
    poisoned[1] = torch.nan
    method = SeedSelect(SeedSelect.Config(**{"iterations": 1, **settings}))
    artifact = method.prepare(backbone, models, material(noise(2, 3, 16, 16)))

    def run(rows, indices):
        chances = [Chance(i, ("test",)) for i in indices]
        order = Order("a star", torch.stack(rows), "circle", chances, artifact=artifact)
        return method(backbone, models, order, Sampler(3, 2.0))

    first, other = run([row_CHW, *others], [5, 1, 2, 3]), run([*poisoned.flip(0), row_CHW], [8, 9, 7, 5])
    assert torch.equal(other.z_BCHW[3], first.z_BCHW[0])
    assert other.losses[3] == first.losses[0]
    assert all(math.isfinite(loss) for loss in first.losses[0])
    assert not torch.isfinite(other.z_BCHW[1]).any()
    assert all(math.isnan(loss) for loss in other.losses[1])


def test_a_row_of_tangram_knows_neither_its_neighbours_nor_its_slot(tangram, models):
    z_BCHW = noise(3, *tangram.latent_shape)
    method = SeedSelect(SeedSelect.Config(iterations=1, views=2))
    artifact = method.prepare(tangram, models, material(noise(1, 3, 64, 64)))

    def run(*rows):
        chances = [Chance(i, ("test",)) for i in rows]
        order = Order("a red star", z_BCHW[list(rows)], chances=chances, artifact=artifact)
        return method(tangram, models, order, Sampler(3, 2.0)).z_BCHW

    assert torch.equal(run(0, 1)[0], run(2, 0)[1])


def test_a_finished_row_keeps_its_seed_while_others_go_on():
    """Rows on parabolas at different distances: Adam's steps are equal, so the nearest arrives first."""
    start = torch.tensor([0.1, 1.0, 0.4])[:, None, None, None].expand(3, 1, 2, 2).clone()
    seen = []

    def parabola(z_BCHW):
        return z_BCHW.square().mean(dim=(1, 2, 3)), z_BCHW

    def finished(z_BCHW, latents, losses):
        seen.append(z_BCHW.detach().clone())
        return [Plateau(plateau=1e-3, patience=1).reached(row) for row in losses]

    options = {"iterations": 30, "lr": 0.1, "decay_from": 30, "keep_norm": False}
    z_BCHW, losses, finished_B = descend(start, parabola, finished, **options)
    ended = [len(row) for row in losses]
    assert ended[0] < ended[2] < ended[1] < 30
    assert len(seen) == max(ended)  # and nothing is computed after the last one has finished
    for row, count in enumerate(ended):
        for later in seen[count - 1 :]:
            assert torch.equal(later[row], seen[count - 1][row])
        assert torch.equal(z_BCHW[row], seen[count - 1][row])
        assert not torch.equal(seen[count - 1][row], seen[count - 2][row])
    assert finished_B.tolist() == [True] * 3
    _, all_losses, finished_B = descend(start, parabola, lambda z, latents, losses: [False] * 3, **options)
    assert finished_B.tolist() == [False] * 3
    assert [len(row) for row in all_losses] == [30] * 3
    for row, count in enumerate(ended):  # a stop cuts a row's way short and changes nothing of it
        assert all_losses[row][:count] == losses[row]


@pytest.mark.parametrize("gradient", ["exact", "one_step"])
def test_a_row_stops_when_the_picture_that_is_drawn_is_recognised(refine, gaussian_backbone, gradient):
    """From dark to bright: one row passes as it comes, one on its way, one not in time."""
    start = torch.tensor([2.0, -0.05, -3.0], dtype=torch.float64)[:, None, None, None].repeat(1, 4, 4, 4)
    settings = {"latent": 1.0, "semantic": 0.0, "lr": 0.1, "decay_from": 9, "iterations": 6}
    stop = {"classifier": "any", "probability": 0.9}
    refined = refine(start, stop=stop, gradient=gradient, **settings)
    counts = [len(row) - 2 for row in refined.losses]
    assert counts[0] == 1
    assert 1 < counts[1] < 6
    assert counts[2] == 6
    assert torch.equal(refined.z_BCHW[0], start[0])
    # stopped at the seed before its last loss: that of so many iterations without a rule
    whole = refine(start, gradient=gradient, **settings | {"iterations": counts[1] - 1})
    assert torch.equal(refined.z_BCHW[1], whole.z_BCHW[1])
    with torch.no_grad():
        mean = [
            float(denoise(gaussian_backbone(mean=0.0), z[1:2], "", SAMPLER)[:, :3].mean())
            for z in (
                refined.z_BCHW,
                refine(start, gradient=gradient, **settings | {"iterations": counts[1] - 2}).z_BCHW
                if counts[1] > 2
                else start,
            )
        ]
    assert mean[1] < math.log(9) / 40 <= mean[0]


def test_a_row_that_a_cheap_gradient_made_worse_stays_as_it_came(refine):
    """On Gaussian data x̂0 from z_T is nearly the mean 0, so one step always asks for more brightness.

    For a seed whose picture is too dark that is right; for one that is too bright already, wrong.
    """
    start = torch.tensor([-2.0, 3.0], dtype=torch.float64)[:, None, None, None].repeat(1, 4, 4, 4)
    settings = {"latent": 0.5, "semantic": 0.0, "iterations": 3}
    refined = refine(start, gradient="one_step", **settings)
    (dark_before, *_, dark_after), (bright_before, *followed, bright_after) = refined.losses
    assert dark_after < dark_before
    assert not torch.equal(refined.z_BCHW[0], start[0])
    assert followed[-1] < followed[0]  # what it followed did fall
    assert bright_after > bright_before
    assert torch.equal(refined.z_BCHW[1], start[1])
    exact = refine(start, gradient="exact", **settings)
    assert exact.losses[1][0] == bright_before
    assert exact.losses[1][-1] < bright_before


def test_a_row_that_is_recognised_stays_moved_though_its_loss_rose(refine, gaussian_backbone):
    """As above, brighter than the loss asks for; but the classifier wants it a little brighter still."""
    start = torch.full((1, 4, 4, 4), 3.0, dtype=torch.float64)
    brightness = float(denoise(gaussian_backbone(mean=0.0), start, "", SAMPLER)[:, :3].mean())
    wanted = 1 / (1 + math.exp(-40 * (brightness + 0.01)))
    settings = {"latent": 0.5, "semantic": 0.0, "iterations": 6, "gradient": "one_step"}
    refined = refine(start, stop={"classifier": "any", "probability": wanted}, **settings)
    (before, *followed, after) = refined.losses[0]
    assert 1 < len(followed) < 6
    assert after > before
    assert not torch.equal(refined.z_BCHW, start)


@pytest.mark.parametrize(("settings", "passes"), [({}, 4), ({"views": 2}, 5), ({"gradient": "truncated"}, 4)])
def test_no_pass_through_the_sampler_is_made_twice(
    gaussian_backbone, simple_models, settings, passes, monkeypatch
):
    """Three iterations, and the picture of the moved seed; that of the seed that came where there are views.

    All is kept, so nothing is run again; and what one iteration kept is gone at its end.
    """
    start = noise(2, 4, 4, 4, dtype=torch.float64)
    artifact = {"clip_E": noise(5, seed=1).double(), "latent_CHW": noise(4, 4, 4, seed=2).double()}
    order = Order("", start, chances=[DUMMY] * 2, artifact=artifact)

    def run(iterations, memory):
        backbone = gaussian_backbone()
        monkeypatch.setattr(Memory, "spare", lambda device: memory)
        method = SeedSelect(SeedSelect.Config(iterations=iterations, **settings))
        method(backbone, simple_models(4), order, SAMPLER)
        return backbone.batches

    one, three = Memory(2**40), Memory(2**40)
    run(1, one)
    assert run(3, three) == [2] * passes * SAMPLER.steps
    assert one.kept == three.kept > 0


def test_what_is_kept_changes_no_bit_of_a_seed(load_tiny, models, monkeypatch):
    backbone = load_tiny()
    method = SeedSelect(SeedSelect.Config(iterations=2, views=2))
    artifact = method.prepare(backbone, models, material(noise(2, 3, 16, 16)))
    order = Order("a star", noise(2, *backbone.latent_shape), chances=[DUMMY] * 2, artifact=artifact)
    made = []
    for budget in (0, 2_000_000, 2**40):
        monkeypatch.setattr(Memory, "spare", lambda device, budget=budget: Memory(budget))
        made.append(method(backbone, models, order, Sampler(3, 2.0)))
    assert torch.equal(made[0].z_BCHW, made[1].z_BCHW)
    assert torch.equal(made[0].z_BCHW, made[2].z_BCHW)
    assert made[0].losses == made[1].losses == made[2].losses


def test_views_and_noise_come_from_each_rows_chance(refine):
    start = noise(2, 4, 4, 4, dtype=torch.float64)
    for settings in ({"views": 3}, {"noise": 0.2}):
        first, again, other = (
            refine(start, indices=indices, iterations=3, lr=1e-9, **settings).losses
            for indices in ([4, 7], [4, 7], [5, 7])
        )
        assert first == again
        assert first[0] != other[0]
        assert first[1] == other[1]
        before, *followed, after = first[0]
        assert before == pytest.approx(after)  # judged by the image itself
        assert len({round(loss, 6) for loss in followed}) == 3  # iterations differ in nothing but the views


def test_norms_are_kept_when_asked(refine):
    z_BCHW = noise(2, 4, 4, 4, dtype=torch.float64) * torch.tensor([1.0, 1.2])[:, None, None, None]
    before_B = z_BCHW.flatten(1).norm(dim=1)
    free, kept = (refine(z_BCHW, norm=norm).z_BCHW for norm in ("free", "keep"))
    torch.testing.assert_close(kept.flatten(1).norm(dim=1), before_B)
    assert (kept - z_BCHW).flatten(1).norm(dim=1).min() > 1e-2
    assert (free.flatten(1).norm(dim=1) - before_B).abs().min() > 1e-3


def test_it_works_inside_no_grad_and_leaves_its_input_alone(refine):
    z_BCHW = noise(1, 4, 4, 4, dtype=torch.float64)
    before = z_BCHW.clone()
    with torch.no_grad():
        refined = refine(z_BCHW, iterations=1)
    assert torch.equal(z_BCHW, before)
    assert not torch.equal(refined.z_BCHW, before)


def test_the_artifact_is_the_mean_of_unnormalised_features_and_of_latents(load_tiny, simple_models):
    backbone, models = load_tiny(), simple_models(16)
    image_N3hw = noise(3, 3, 16, 16) * torch.tensor([0.1, 0.2, 1.0])[:, None, None, None]
    artifact = SeedSelect(SeedSelect.Config()).prepare(backbone, models, material(image_N3hw))
    features_NE = models.clip("").encode_image(image_N3hw)
    torch.testing.assert_close(artifact["clip_E"], F.normalize(features_NE.mean(0), dim=0))
    assert F.cosine_similarity(artifact["clip_E"], F.normalize(features_NE, dim=1).mean(0), dim=0) < 0.99
    with torch.no_grad():
        torch.testing.assert_close(artifact["latent_CHW"], backbone.encode(image_N3hw).mean(0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"looks at the last 3 sampling steps, generate has 2: set generate\.steps to at least 3"),
        ({"stop": {"classifier": "x"}}, "does not know the class 'gryphon'; it knows bright, dark"),
        ({"gradient": "truncated", "gradient_steps": 9}, "gradient_steps is 9, generate has 4 steps: set"),
        ({"gradient": "one_step", "gradient_steps": 5}, "set gradient_steps to at most 4"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_anything_is_loaded(simple_models, settings, said):
    method = SeedSelect(SeedSelect.Config(**settings))
    with pytest.raises(UserError, match=said):
        method.check(Sampler(4 if settings else 2, 1.0), simple_models(4), "gryphon")


def test_steps_of_a_gradient_that_has_none_are_refused():
    with pytest.raises(ValidationError, match="gradient_steps belongs to gradient one_step or truncated"):
        SeedSelect.Config(gradient_steps=4)


def test_the_scorer_of_a_stop_rule_is_one_of_its_models():
    """So a build's fingerprints cover its bytes."""
    stop = {"classifier": "tangram"}
    assert SeedSelect(SeedSelect.Config()).models() == {"clip": "tangram"}
    assert SeedSelect(SeedSelect.Config(stop={"plateau": 0.1})).models() == {"clip": "tangram"}
    assert SeedSelect(SeedSelect.Config(stop=stop)).models() == {"clip": "tangram", "classifier": "tangram"}
