"""Every kind of diffusion model against diffusers' own pipeline: the same texts, latents and images."""

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from schemas.errors import UserError
from stages.backbones.diffusion.load import load_backbone
from stages.backbones.diffusion.settings import BackboneSettings
from stages.contract import Sampler
from stages.generate.redraw import redraw
from stages.invert.ddim import invert_ddim
from stages.sampling import condition, denoise
from stages.schedule import Diffusion
from tests.tiny_models import BETAS, DDIM, small_decoder, stable_diffusion_3, stable_diffusion_xl

CPU = torch.device("cpu")
PROMPT = "a cat"
EXACT = {"rtol": 0, "atol": 1e-4}  # of float32 latents of deviation 1, after ten steps
SPACINGS = ("leading", "trailing", "linspace")
THEIRS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm_solver++": DPMSolverMultistepScheduler,
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(pipeline, folder, **settings):
    pipeline.save_pretrained(folder)
    return load_backbone(BackboneSettings(model=str(folder), **settings), CPU)


def drawn(backbone, steps, guidance, scheduler=None):
    z_BCHW = noise(2, *backbone.latent_shape)
    with torch.no_grad():
        return denoise(backbone, z_BCHW, PROMPT, Sampler(steps, guidance, scheduler))


def drawn_by(pipeline, backbone, steps, guidance, **options):
    return pipeline(
        [PROMPT] * 2,
        latents=noise(2, *backbone.latent_shape),
        num_inference_steps=steps,
        guidance_scale=guidance,
        **{"output_type": "latent", **options},
    ).images


# --- texts -----------------------------------------------------------------------------------------------


def test_sd2_reads_prompts_as_its_pipeline(kind_of_model):
    pipeline, _, backbone = kind_of_model("sd2")
    theirs, _ = pipeline.encode_prompt(["a cat", ""], "cpu", 1, False)
    torch.testing.assert_close(backbone.embed(["a cat", ""]).tokens_BLD, theirs)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_reads_prompts_and_their_absence_as_its_pipeline(tmp_path, zeros):
    pipeline = stable_diffusion_xl(force_zeros=zeros)
    text, negative = (load(pipeline, tmp_path, dtype="float32").embed([prompt]) for prompt in (PROMPT, ""))
    tokens, no_tokens, pooled, no_pooled = pipeline.encode_prompt(
        PROMPT, device="cpu", do_classifier_free_guidance=True
    )
    for ours, theirs in ((text, (tokens, pooled)), (negative, (no_tokens, no_pooled))):
        torch.testing.assert_close(ours.tokens_BLD, theirs[0])
        torch.testing.assert_close(ours.pooled_BP, theirs[1])
    assert bool((negative.tokens_BLD == 0).all()) == zeros


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_reads_prompts_as_its_pipeline_with_and_without_t5(tmp_path, t5):
    pipeline = stable_diffusion_3(t5)
    backbone = load(pipeline, tmp_path)
    tokens, no_tokens, pooled, no_pooled = pipeline.encode_prompt(PROMPT, None, None, device="cpu")
    for prompt, theirs in ((PROMPT, (tokens, pooled)), ("", (no_tokens, no_pooled))):
        ours = backbone.embed([prompt])
        torch.testing.assert_close(ours.tokens_BLD, theirs[0], **EXACT)
        torch.testing.assert_close(ours.pooled_BP, theirs[1])
    assert bool((tokens[:, 12:] == 0).all()) == (not t5)


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3"])
def test_a_known_word_as_a_vector_reads_as_the_word(kind_of_model, kind):
    """The vectors of all encoders lie side by side in it; in the middle of a prompt, too."""
    backbone = kind_of_model(kind)[2]
    ours = backbone.embed_words("a <w> b", {"<w>": backbone.word("c")[None]})
    plain = backbone.embed(["a c b"])
    torch.testing.assert_close(ours.tokens_BLD, plain.tokens_BLD, rtol=0, atol=1e-5)
    if plain.pooled_BP is not None:
        torch.testing.assert_close(ours.pooled_BP, plain.pooled_BP, rtol=0, atol=1e-5)
    other = backbone.embed(["a d b"])
    assert (other.tokens_BLD - plain.tokens_BLD).abs().max() > 1e-2


# --- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl", "sd3"])
def test_images_are_those_of_the_pipeline(kind_of_model, kind, guidance):
    """Each with the sampler of its checkpoint."""
    pipeline, _, backbone = kind_of_model(kind)
    scheduler = "euler" if kind == "sdxl" else None
    ours_BCHW = drawn(backbone, 10, guidance, scheduler)
    torch.testing.assert_close(ours_BCHW, drawn_by(pipeline, backbone, 10, guidance), **EXACT)
    assert (ours_BCHW - noise(2, *backbone.latent_shape)).abs().max() > 0.1
    with torch.no_grad():
        image_B3hw = (backbone.decode(ours_BCHW).clamp(-1, 1) + 1) / 2
    theirs_B3hw = drawn_by(pipeline, backbone, 10, guidance, output_type="pt")
    torch.testing.assert_close(image_B3hw, theirs_B3hw, **EXACT)


def test_images_of_the_unconditional_model_are_those_of_its_pipeline(kind_of_model):
    pipeline, _, backbone = kind_of_model("ldm")
    generator = torch.Generator().manual_seed(7)
    theirs = pipeline(batch_size=2, generator=generator, num_inference_steps=10, output_type="np").images
    z_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        z0_BCHW = denoise(backbone, z_BCHW, "", Sampler(10, 1.0))
        image_B3hw = (backbone.decode(z0_BCHW).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(image_B3hw, torch.from_numpy(theirs).permute(0, 3, 1, 2), **EXACT)
    with torch.no_grad():
        latents_BCHW = (
            pipeline.vqvae.encode(2 * image_B3hw - 1).latents * pipeline.vqvae.config.scaling_factor
        )
        torch.testing.assert_close(backbone.encode(2 * image_B3hw - 1), latents_BCHW)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_each_sampler_is_diffusers_scheduler_of_that_name(
    load_tiny, tiny_pipeline, name, steps, spacing, prediction
):
    settings = {"timestep_spacing": spacing, "prediction_type": prediction}
    if name == "ddim" and spacing == "linspace":
        pytest.skip("diffusers' steps do not join up there; see stages.schedule")
    backbone = load_tiny(**settings)
    scheduler = THEIRS[name].from_config(tiny_pipeline.scheduler.config, **settings)
    pipeline = type(tiny_pipeline)(
        **{**tiny_pipeline.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        drawn(backbone, steps, 3.0, name), drawn_by(pipeline, backbone, steps, 3.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", THEIRS)
def test_a_checkpoint_that_names_no_spacing_gets_each_schedulers_own(name):
    """As Stable Diffusion 1.5's, whose config is older than the key."""
    config = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler = THEIRS[name].from_config(config)
    scheduler.set_timesteps(10)
    schedule = Diffusion("epsilon", DDIMScheduler(**DDIM).alphas_cumprod, config)
    assert list(schedule.path(10, name).times) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_lightning_is_euler_at_trailing_times_whatever_the_checkpoint_says(kind_of_model):
    pipeline, _, backbone = kind_of_model("sdxl")
    native = pipeline.scheduler
    assert native.config.timestep_spacing == "leading"
    pipeline.scheduler = EulerDiscreteScheduler.from_config(native.config, timestep_spacing="trailing")
    theirs_BCHW = drawn_by(pipeline, backbone, 4, 1.0)
    pipeline.scheduler = native
    torch.testing.assert_close(drawn(backbone, 4, 1.0, "lightning"), theirs_BCHW, **EXACT)
    assert [round(t) for t in backbone.schedule.path(4, "lightning").times] == [999, 749, 499, 249]


IMG2IMG = {
    "sd": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
}


@pytest.mark.parametrize("kind", IMG2IMG)
def test_a_redrawn_image_is_that_of_the_image_to_image_pipeline(kind_of_model, kind):
    pipeline, _, backbone = kind_of_model(kind)
    options = {"requires_safety_checker": False} if kind == "sd" else {}
    theirs = IMG2IMG[kind](**pipeline.components, **options)
    theirs.set_progress_bar_config(disable=True)
    z0_BCHW = noise(1, *backbone.latent_shape, seed=1)
    latents_BCHW = theirs(
        PROMPT, image=z0_BCHW, strength=0.6, num_inference_steps=10, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    noise_BCHW = torch.randn(z0_BCHW.shape, generator=torch.Generator().manual_seed(5))
    sampler = Sampler(10, 3.0, "euler" if kind == "sdxl" else None)
    with torch.no_grad():
        asked = condition(backbone, PROMPT, 3.0, 1)
        (ours_BCHW,) = redraw(backbone, z0_BCHW, noise_BCHW, asked, sampler, [0.6])
    torch.testing.assert_close(ours_BCHW, latents_BCHW, **EXACT)


@pytest.mark.parametrize("kind", ["sd", "ldm"])
def test_inversion_is_diffusers_inverse_scheduler(kind_of_model, kind):
    """Not of a v-model, which `stages.invert.ddim` reads as the ε-model that it stands for."""
    pipeline, _, backbone = kind_of_model(kind)
    scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    z0_BCHW = z_BCHW = noise(2, *backbone.latent_shape, seed=3)
    with torch.no_grad():
        text = backbone.embed([PROMPT]).expand(2)
        for t in scheduler.timesteps:
            output_BCHW = backbone.predict(z_BCHW, int(t), text)
            z_BCHW = scheduler.step(output_BCHW, int(t), z_BCHW).prev_sample
        ours_BCHW = invert_ddim(backbone, z0_BCHW, PROMPT, Sampler(10, 1.0))
    torch.testing.assert_close(ours_BCHW, z_BCHW, **EXACT)


# --- what a checkpoint may bring, and settings -----------------------------------------------------------


def test_other_weights_are_laid_over_the_unet(tmp_path):
    pipeline = stable_diffusion_xl()
    plain = load(pipeline, tmp_path / "base")
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight.mul_(1.1)
    pipeline.unet.save_pretrained(tmp_path / "lightning")
    file = tmp_path / "lightning" / "diffusion_pytorch_model.safetensors"
    laid = load_backbone(BackboneSettings(model=str(tmp_path / "base"), unet=str(file)), CPU)
    assert laid.fingerprint != plain.fingerprint
    theirs_BCHW = drawn_by(pipeline, laid, 4, 1.0)
    torch.testing.assert_close(drawn(laid, 4, 1.0, "euler"), theirs_BCHW, **EXACT)
    with pytest.raises(UserError, match=r"give a \.safetensors file, or one on the hub as OWNER/NAME/FILE"):
        load_backbone(BackboneSettings(model=str(tmp_path / "base"), unet="lightning.bin"), CPU)
    other = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="does not fit its UNet"):
        load_backbone(BackboneSettings(model=str(tmp_path / "base"), unet=str(other)), CPU)


def test_a_small_decoder_decodes_and_the_vae_goes_on_encoding(kind_of_model, tmp_path):
    _, folder, plain = kind_of_model("sd")
    decoder = small_decoder()
    decoder.save_pretrained(tmp_path)
    small = load_backbone(BackboneSettings(model=str(folder), decoder=str(tmp_path)), CPU)
    assert small.fingerprint != plain.fingerprint
    z_BCHW, image_B3hw = noise(1, 4, 8, 8), noise(1, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(small.decode(z_BCHW), decoder.decode(z_BCHW).sample)
        torch.testing.assert_close(small.encode(image_B3hw), plain.encode(image_B3hw))


def test_the_vae_of_sdxl_stays_in_float32_where_it_would_overflow(kind_of_model):
    _, folder, _ = kind_of_model("sdxl")
    half = load_backbone(BackboneSettings(model=str(folder), dtype="float16"), CPU)
    assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert (
        load_backbone(BackboneSettings(model=str(folder), dtype="bfloat16"), CPU).vae.dtype == torch.bfloat16
    )


def test_a_model_in_a_subfolder_is_the_same_model(kind_of_model):
    _, folder, backbone = kind_of_model("sd2")
    inside = BackboneSettings(model=str(folder.parent), subfolder=folder.name)
    assert load_backbone(inside, CPU).fingerprint == backbone.fingerprint
    with pytest.raises(UserError, match=r"lacks unet/config\.json.* set `subfolder` if it lies deeper"):
        load_backbone(BackboneSettings(model=str(folder.parent)), CPU)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_sampler_of_the_other_kind_is_refused(kind_of_model, kind):
    backbone = kind_of_model(kind)[2]
    with pytest.raises(UserError, match=r"scheduler .* given, and a .*allowed: "):
        drawn(backbone, 2, 1.0, "flow" if kind == "sd" else "ddim")
