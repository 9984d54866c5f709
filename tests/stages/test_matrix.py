"""Every method on every kind of backbone: it runs, or a plan refuses it in one line."""

from pathlib import Path

import pytest
import torch

from pipeline.build import resolve
from pipeline.config import load
from schemas.errors import UserError
from stages import registry
from stages.backbones.diffusion.architectures import architecture_of, table
from stages.backbones.models import LoadedModels
from stages.contract import Chance, Material, Order, Question
from tests.small_build import make_config, noise_recipe
from tests.tiny_models import KINDS

SHORT = {"steps": 2, "templates": ["{token}"], "batch": 1, "placeholder": "<w>", "start": None}
FEW = {  # settings with which a method is done soon on prompts of 12 tokens
    "cap2aug": {"ratio": 1.0},
    "da_fusion": {"token": SHORT},
    "genie_ada": {"ratios": [0.5, 1.0]},
    "minority_prompt": {"iterations": 1, "tokens": 1},
    "null_prompt": {"negative": "dull"},
    "seedselect": {"iterations": 1},
    "textual_inversion": {"token": SHORT},
}
PROMPT = "a cat"


def of(kind, name, **settings):
    cls = registry.resolve(kind, name)
    if kind in ("invert", "generate"):
        settings = {"steps": 4, **settings}
    return cls(cls.Config.model_validate({"method": name, **FEW.get(name, {}), **settings}))


def images(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def order_for(backbone, method, models):
    z_BCHW = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    artifact = {}
    if method.prepared() is not None:
        artifact = method.prepare(
            backbone, models, Material(images(2, 2), "cat", PROMPT, Chance(0, ("artifact",)))
        )
    chances = [Chance(i, ("test",)) for i in range(2)]
    return Order(PROMPT, z_BCHW, "cat", chances, images(2, 3), artifact)


def guidance_of(architecture):
    return 2.0 if architecture.prompted else 1.0


@pytest.fixture(params=KINDS)
def backbone_of(request, kind_of_model):
    _, folder, backbone = kind_of_model(request.param)
    return backbone, architecture_of(folder, "test"), folder


@pytest.mark.parametrize("name", registry.names("generate"))
def test_generating(backbone_of, tmp_path, drawings, name):
    backbone, architecture, folder = backbone_of
    settings = {"guidance": 3.0 if name == "null_prompt" else guidance_of(architecture)}
    method = of("generate", name, **settings)
    if architecture.refuses(method.needs):
        recipe = noise_recipe(generate=method.config.model_dump(mode="json", exclude_none=True))
        line = rf"^recipes\.plain\.generate: {name} needs a backbone .*, and {architecture.name} is none$"
        content = {"recipes": {"plain": recipe}, "backbone": {"model": str(folder)}}
        with pytest.raises(UserError, match=line):
            resolve(load(make_config(tmp_path, drawings, **content)))
        return
    models = LoadedModels(torch.device("cpu"), backbone)
    image_B3hw = method(backbone, models, order_for(backbone, method, models)).image_B3hw
    assert image_B3hw.shape == (2, 3, 16, 16)
    assert image_B3hw.isfinite().all()
    assert image_B3hw.abs().max() <= 1
    assert (image_B3hw[0] - image_B3hw[1]).abs().max() > 1e-3  # of other seeds and sources


@pytest.mark.parametrize("name", registry.names("invert"))
def test_inverting(backbone_of, name):
    backbone, architecture, _ = backbone_of
    method = of("invert", name, **({"steps": 30} if name != "fixed_point" else {"steps": 10}))
    if reason := architecture.refuses(method.needs):
        assert ("flow" in reason) == ("flow" not in architecture.provides)
        return
    # an image of the model's own, so that it has a seed
    with torch.no_grad():
        image_B3hw = backbone.decode(0.5 * torch.ones(2, *backbone.latent_shape)).clamp(-1, 1)
    inverted = method(backbone, image_B3hw, PROMPT)
    assert inverted.z_BCHW.shape == (2, *backbone.latent_shape)
    assert all(torch.isfinite(torch.tensor(list(m.values()))).all() for m in inverted.measures)


@pytest.mark.parametrize("gradient", ["exact", "one_step", "truncated"])
def test_refining(backbone_of, gradient):
    backbone, architecture, _ = backbone_of
    models = LoadedModels(torch.device("cpu"), backbone)
    method = of("refine", "seedselect", gradient=gradient)
    order = order_for(backbone, method, models)
    sampler = of("generate", "text_to_image", guidance=guidance_of(architecture)).sampler()
    refined = method(backbone, models, order, sampler)
    for losses, z_CHW, start_CHW in zip(refined.losses, refined.z_BCHW, order.z_BCHW, strict=True):
        moved = not torch.equal(z_CHW, start_CHW)
        assert moved == (losses[-1] <= losses[0])


def test_likelihood(backbone_of):
    backbone, _, _ = backbone_of
    models = LoadedModels(torch.device("cpu"), backbone)
    method = of("measure", "likelihood", steps=2)
    scores = method.score(models, images(2), Question("cat", PROMPT))["log2p_per_dim"]
    assert torch.isfinite(torch.tensor(scores)).all()
    assert scores[0] != scores[1]


def test_a_plan_refuses_guidance_where_nothing_is_read(kind_of_model, tmp_path):
    _, folder, _ = kind_of_model("ldm")
    recipe = noise_recipe(generate={"method": "text_to_image", "steps": 2, "guidance": 4})
    config = make_config(tmp_path, recipes={"plain": recipe}, backbone={"model": str(folder)})
    with pytest.raises(UserError, match=r"recipes\.plain\.generate\.guidance: 4 given, .* set it to 1$"):
        resolve(load(config))


@pytest.mark.parametrize(("kind", "scheduler"), [("sd3", "ddim"), ("sd", "flow")])
def test_a_plan_refuses_a_sampler_of_the_other_kind(kind_of_model, tmp_path, kind, scheduler):
    _, folder, _ = kind_of_model(kind)
    recipe = noise_recipe(generate={"method": "text_to_image", "steps": 2, "scheduler": scheduler})
    config = make_config(tmp_path, recipes={"plain": recipe}, backbone={"model": str(folder)})
    with pytest.raises(UserError, match=rf"scheduler: {scheduler} given; a backbone of kind {kind} has "):
        resolve(load(config))


def test_the_readme_has_the_table():
    assert table() in (Path(__file__).parents[2] / "README.md").read_text()
