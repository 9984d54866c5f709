"""Full-size diffusion models with random weights, built without any download.

How fast a model is does not depend on what its weights are, so that a benchmark needs the shapes alone: the
published configs, as diffusers' own classes take them (Rombach et al., arXiv:2112.10752; Podell et al.,
arXiv:2307.01952; Esser et al., arXiv:2403.03206). Texts are random too, in place of the text encoders, whose
time is that of one short batch for each prompt. `tangram` is the embedded model, with its weights; beside
any other stands a CLIP ViT-H/14 with random ones.

Shape letters: L D text tokens and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from schemas.errors import UserError

if TYPE_CHECKING:
    import torch

    from stages.backbones.clip import Clip
    from stages.backbones.diffusion.model import LatentDiffusion

SEED = 11

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
# of the schedulers that the checkpoints bring
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
             "set_alpha_to_one": False, "clip_sample": False}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, in the words of diffusers' constructors."""

    kind: str  # as `stages.backbones.diffusion.architectures` names it
    denoiser: Mapping[str, Any]
    text: tuple[int, int, int | None]  # L, D, and the width of the pooled state
    vae: Mapping[str, Any] = field(default_factory=lambda: VAE | {"scaling_factor": 0.18215})
    schedule: Mapping[str, Any] = field(default_factory=lambda: DIFFUSION)


_SDXL = Shape("sdxl", SDXL, (77, 2048, 1280), VAE | {"scaling_factor": 0.13025})
SHAPES: dict[str, Shape] = {
    "sd15": Shape("sd", SD1, (77, 768, None)),
    "sd21": Shape("sd", SD2, (77, 1024, None)),
    "sd21-768": Shape(
        "sd",
        SD2 | {"sample_size": 96},
        (77, 1024, None),
        schedule=DIFFUSION | {"prediction_type": "v_prediction"},
    ),
    "sdxl": _SDXL,
    "sd3": Shape(
        "sd3",
        SD3,
        (77 + 256, 4096, 2048),
        VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
               "use_quant_conv": False, "use_post_quant_conv": False},
        {"shift": 3.0},
    ),
}  # fmt: skip
NAMES = ("tangram", *SHAPES)
CLIP = "ViT-H-14"


def model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Mapping[str, Shape] = SHAPES,
    *,
    compile: bool = True,
) -> LatentDiffusion:
    """The backbone of that name: tangram as it is, any other with random weights, made on the device."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel

    from stages.backbones.diffusion.load import load_backbone
    from stages.backbones.diffusion.settings import BackboneSettings

    precision: Any = str(dtype).removeprefix("torch.")
    if name == "tangram":
        return load_backbone(BackboneSettings(dtype=precision, compile=compile), device)  # type: ignore[return-value]
    if name not in shapes:
        raise UserError(f"no model {name!r}; allowed: {', '.join(('tangram', *shapes))}")
    shape = shapes[name]
    torch.manual_seed(SEED)
    network: Any = SD3Transformer2DModel if shape.kind == "sd3" else UNet2DConditionModel
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            denoiser, vae = network(**shape.denoiser), AutoencoderKL(**shape.vae)
    finally:
        torch.set_default_dtype(default)
    return _class_of(shape, device, dtype)(
        denoiser=denoiser,
        vae=vae,
        encoders=(),
        schedule=_schedule(shape),
        fingerprint=f"random {name} {precision}",
        device=device,
        compile=compile,
        what=name,
        **({"zeros_for_no_words": False} if shape.kind == "sdxl" else {}),
    )


def clip(name: str, device: torch.device, dtype: torch.dtype | None = None, architecture: str = CLIP) -> Clip:
    """The CLIP model that goes with the backbone of that name, its image tower in the precision."""
    import open_clip
    import torch

    from stages.backbones.clip import Clip, features, load_clip
    from stages.backbones.device import tower_precision_on
    from stages.backbones.resize import Preprocessing

    if name == "tangram":
        return load_clip("tangram", device, dtype)
    dtype = dtype or tower_precision_on(device)
    torch.manual_seed(SEED)
    network: Any = open_clip.create_model(architecture, device=device).eval().requires_grad_(False)
    network.visual.to(dtype)
    cfg = network.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else min(cfg["size"])
    prepare = Preprocessing(size, cfg["mean"], cfg["std"], device)
    return Clip(
        f"random {architecture} {dtype}",
        float(network.logit_scale.exp()),
        see=lambda image_B3hw: features(network.encode_image, prepare(image_B3hw), dtype),
        read=lambda text: network.encode_text(open_clip.get_tokenizer(architecture)([text]).to(device)),
    )


def _class_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[..., LatentDiffusion]:
    """The class of the kind, with random texts in place of its encoders."""
    import torch

    from schemas.ids import random_stream
    from stages.backbones.diffusion import model as kinds
    from stages.contract import Text

    classes: dict[str, Any] = {
        "sd": kinds.StableDiffusion,
        "sdxl": kinds.StableDiffusionXL,
        "sd3": kinds.StableDiffusion3,
    }

    def drawn(prompt: str, *size: int) -> torch.Tensor:
        numbers = random_stream("text", prompt, *size).standard_normal((1, *size), dtype="float32")
        return torch.from_numpy(numbers).to(device, dtype)

    def embed(self: Any, prompt: str) -> Text:
        tokens, width, pooled = shape.text
        return Text(drawn(prompt, tokens, width), None if pooled is None else drawn(prompt, pooled))

    def word(self: Any, text: str | None) -> torch.Tensor:
        return drawn(str(text), shape.text[1])[0].float()

    def embed_words(self: Any, prompt: str, words: Mapping[str, torch.Tensor]) -> Text:
        said, vectors_BND = embed(self, prompt), torch.stack(list(words.values()), dim=1).to(dtype)
        tokens_BLD = said.tokens_BLD[:, : -vectors_BND.shape[1]].expand(len(vectors_BND), -1, -1)
        return Text(torch.cat([tokens_BLD, vectors_BND], dim=1), said.expand(len(vectors_BND)).pooled_BP)

    own = {"_embed_uncached": embed, "word": word, "embed_words": embed_words}
    return type("Random", (classes[shape.kind],), own)


def _schedule(shape: Shape) -> Any:
    from diffusers import DDIMScheduler

    from stages.schedule import Diffusion, Flow

    if shape.kind == "sd3":
        return Flow(1000, shape.schedule["shift"])
    scheduler = DDIMScheduler(**shape.schedule)
    prediction = shape.schedule.get("prediction_type", "epsilon")
    return Diffusion(prediction, scheduler.alphas_cumprod, dict(scheduler.config))
