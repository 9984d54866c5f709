"""Loading, fingerprints and refusals; the parts against diffusers' own."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from schemas.errors import UserError
from stages.backbones import files
from stages.backbones.diffusion.folder import backbone_fingerprint
from stages.backbones.diffusion.load import load_backbone
from stages.backbones.diffusion.settings import BackboneSettings
from stages.schedule import Level

CPU = torch.device("cpu")


def load(folder, **settings):
    return load_backbone(BackboneSettings(model=str(folder), **settings), CPU)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to be damaged; hashes are kept per path and process, so each test has its own."""
    return shutil.copytree(tiny_folder(), tmp_path / "model")


def images(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_shape_and_schedule_are_read_from_the_folder(load_tiny, tiny_pipeline):
    backbone = load_tiny(prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
    assert (backbone.latent_shape, backbone.image_size) == ((4, 8, 8), 16)
    schedule = backbone.schedule
    assert (schedule.prediction, schedule.spacing, schedule.steps_offset) == ("v_prediction", "trailing", 1)
    assert schedule.path(10).levels[-1] == Level(1.0, 0.0)
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod.float(), tiny_pipeline.scheduler.alphas_cumprod)
    assert load_tiny().schedule.path(10).levels[-1] == load_tiny().schedule.level(0)


def test_encoding_is_the_scaled_posterior_mean_and_decoding_its_inverse_scaling(load_tiny, tiny_pipeline):
    backbone, vae = load_tiny(), tiny_pipeline.vae
    with torch.no_grad():
        latents_BCHW = backbone.encode(images(2))
        torch.testing.assert_close(latents_BCHW, vae.encode(images(2)).latent_dist.mean * 0.9)
        torch.testing.assert_close(backbone.decode(latents_BCHW), vae.decode(latents_BCHW / 0.9).sample)


def test_prompts_are_embedded_as_diffusers_does(load_tiny, tiny_pipeline):
    prompts = ["a cat", "", "two cats"]
    theirs, _ = tiny_pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(load_tiny().embed(prompts).tokens_BLD, theirs)


def test_an_embedding_does_not_depend_on_the_prompts_beside_it(tangram):
    alone_BLD = tangram.embed(["a red star"]).tokens_BLD
    assert torch.equal(tangram.embed(["a blue ring", "", "a red star"]).tokens_BLD[2:], alone_BLD)


def test_an_embedding_made_in_inference_mode_serves_a_gradient(folder):
    backbone = load(folder)
    with torch.inference_mode():
        backbone.embed(["a cat"])
    strength = torch.tensor(1.0, requires_grad=True)
    (strength * backbone.embed(["a cat"]).tokens_BLD).sum().backward()
    assert strength.grad != 0


def test_a_prompt_that_the_model_cannot_read_whole_is_refused(load_tiny):
    load_tiny().embed(["ten chars!!"])  # with start and end exactly the 12 tokens that there are
    with pytest.raises(UserError, match=r"prompt of 13 tokens given, .* reads 12: shorten 'ten chars!!!'"):
        load_tiny().embed(["ten chars!!!"])


def test_half_precision_networks_keep_float32_latents(tiny_folder):
    backbone = load(tiny_folder(), dtype="bfloat16")
    exact = load(tiny_folder())
    z_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, expected = (b.predict(z_BCHW, 500, b.embed(["a cat"])) for b in (backbone, exact))
        assert backbone.decode(z_BCHW).dtype == backbone.encode(images(1)).dtype == torch.float32
    assert output.dtype == torch.float32
    assert 0 < (output - expected).norm() < 0.05 * expected.norm()


# --- fingerprint -----------------------------------------------------------------------------------------


def test_the_fingerprint_needs_no_weights_and_no_particular_place(tiny_folder, tmp_path):
    elsewhere = shutil.copytree(tiny_folder(), tmp_path / "elsewhere")
    identity = backbone_fingerprint(BackboneSettings(model=str(elsewhere)))
    assert identity == backbone_fingerprint(BackboneSettings(model=str(tiny_folder())))
    assert identity == load(elsewhere).fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
    ],
)
def test_any_byte_that_is_read_changes_the_fingerprint(folder, tiny_folder, name):
    data = bytearray((folder / name).read_bytes())
    if name.endswith(".json"):
        data = data.replace(b"{", b"{ ", 1)  # it stays JSON
    else:
        data[-1] ^= 1
    (folder / name).write_bytes(data)
    changed, intact = (backbone_fingerprint(BackboneSettings(model=str(f))) for f in (folder, tiny_folder()))
    assert changed != intact


def test_files_that_are_not_read_do_not_count(folder, tiny_folder):
    (folder / "README.md").write_text("about")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with_extras, plain = (
        backbone_fingerprint(BackboneSettings(model=str(f))) for f in (folder, tiny_folder())
    )
    assert with_extras == plain


def test_precision_is_part_of_the_fingerprint(tiny_folder):
    settings = [
        BackboneSettings(model=str(tiny_folder()), dtype=d) for d in ("float32", "bfloat16", "float16")
    ]
    assert len({backbone_fingerprint(s) for s in settings}) == 3


def test_a_variant_is_loaded_and_named_by_its_own_files(folder, tiny_pipeline):
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.other.safetensors"))
    variant = BackboneSettings(model=str(folder), variant="other")
    backbone = load_backbone(variant, CPU)
    assert backbone.fingerprint == backbone_fingerprint(variant)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.encode(images(1)), tiny_pipeline.vae.encode(images(1)).latent_dist.mean * 0.9
        )
    with pytest.raises(UserError, match=r"unet has no \*\.safetensors; it has the variant other: set"):
        load(folder)


# --- refusals --------------------------------------------------------------------------------------------


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_models_that_would_load_and_draw_nonsense_are_refused(folder, tiny_folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="prediction_type is sample; epsilon and v_prediction are supported"):
        load(folder)
    shutil.copy(tiny_folder() / "scheduler" / "scheduler_config.json", folder / "scheduler")
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="karras")
    with pytest.raises(UserError, match="timestep_spacing is karras; leading, trailing and linspace"):
        load(folder)
    shutil.copy(tiny_folder() / "scheduler" / "scheduler_config.json", folder / "scheduler")
    shutil.rmtree(folder / "unet")
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=8, in_channels=9, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    ).save_pretrained(folder / "unet")  # fmt: skip
    with pytest.raises(UserError, match="its network reads 9 channels, its VAE gives 4"):
        load(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "no such folder; give tangram"),
        ("/nowhere/at/all", "no such folder; give tangram"),
        ("tangrm", "no such folder; give tangram"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        backbone_fingerprint(BackboneSettings(model=model))


def test_a_hub_model_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="neither a local folder nor to be had from the Hugging Face hub"
    ) as caught:
        load("nobody/no-such-model", revision="v1")
    assert "\n" not in str(caught.value)
    assert "v1" in str(caught.value)


def test_only_hub_models_have_revisions(tiny_folder):
    for model in ("tangram", str(tiny_folder())):
        with pytest.raises(UserError, match="revision v1 given, but only a hub id has revisions"):
            backbone_fingerprint(BackboneSettings(model=model, revision="v1"))


def test_a_folder_that_lacks_a_part_names_it(folder):
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks vae/config\.json"):
        load(folder)


def test_pickled_weights_are_not_read(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"unet has no \*\.safetensors"):
        load(folder)


def test_torn_weights_are_the_users_mistake_in_one_line(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_the_users_mistake(folder):
    edit(folder / "vae" / "config.json", latent_channels=3)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)


def test_tangram_is_checked_before_it_is_used(monkeypatch, tmp_path):
    damaged = shutil.copytree(files.weights.TANGRAM, tmp_path / "tangram")
    with (damaged / "unet" / "config.json").open("a") as file:
        file.write(" ")
    monkeypatch.setattr(files.weights, "TANGRAM", damaged)
    files.tangram.cache_clear()
    try:
        with pytest.raises(UserError, match="damaged"):
            load_backbone(BackboneSettings(), CPU)
    finally:
        files.tangram.cache_clear()


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="unknown key"):
        BackboneSettings(trust_remote_code=True)
    with pytest.raises(ValidationError, match="at least 1 character"):
        BackboneSettings(model="")
    with pytest.raises(ValidationError, match="'float32', 'bfloat16' or 'float16'"):
        BackboneSettings(dtype="float8")
