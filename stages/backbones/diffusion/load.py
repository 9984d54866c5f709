"""Loading a backbone, and what is known of one before it is loaded."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.backbones import files
from stages.backbones.device import default_device, precision_on
from stages.backbones.diffusion.architectures import (
    Architecture,
    architecture_of,
    config_of,
    sizes,
)
from stages.backbones.diffusion.folder import backbone_fingerprint, decoder_folder, folder_of, unet_file
from stages.backbones.diffusion.model import (
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    UnconditionalLatentDiffusion,
)
from stages.backbones.diffusion.settings import BackboneSettings
from stages.backbones.diffusion.text import TextEncoder
from stages.contract import Backbone
from stages.schedule import SPACINGS, Diffusion, Flow, Schedule


def load_backbone(settings: BackboneSettings, device: torch.device | None = None) -> Backbone:
    """The backbone, on the given or the default device."""
    import transformers

    what, folder = f"backbone {settings.model}", folder_of(settings)
    architecture = architecture_of(folder, what)
    device = device or default_device()
    dtype = precision_on(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.inference_mode(False):
            parts = _parts(settings, folder, architecture, dtype, what)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{what} cannot be loaded from {folder}: {files.first_line(error)}; if a copy or download was cut"
            " off, do it again"
        ) from error
    common: dict[str, Any] = {
        "fingerprint": backbone_fingerprint(settings),
        "device": device,
        "compile": settings.compile,
        "what": what,
    }
    match architecture.name:
        case "sd":
            return StableDiffusion(**parts, **common)
        case "sdxl":
            return StableDiffusionXL(**parts, **common, zeros_for_no_words=_zeros_for_no_words(folder))
        case "sd3":
            return StableDiffusion3(**parts, **common)
        case _:
            return UnconditionalLatentDiffusion(**parts, **common)


def _parts(
    settings: BackboneSettings, folder: Path, architecture: Architecture, dtype: torch.dtype, what: str
) -> dict[str, Any]:
    """The components from the files. Weights are mapped into memory, and read when they are first used."""
    import diffusers

    # diffusers and transformers take the precision under different names
    weights: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": settings.variant}
    networks = {
        "sd": diffusers.UNet2DConditionModel,
        "sdxl": diffusers.UNet2DConditionModel,
        "sd3": diffusers.SD3Transformer2DModel,
        "ldm": diffusers.UNet2DModel,
    }
    schedule = schedule_of(folder, architecture, what)

    def network(cls: Any, path: Path, dtype: torch.dtype = dtype, **options: Any) -> Any:
        return cls.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False, **options)

    denoiser = network(networks[architecture.name], folder / architecture.denoiser, **weights)
    if settings.unet is not None:
        file = unet_file(settings)
        try:
            denoiser.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as error:
            raise UserError(f"{what}: {file} does not fit its UNet: {files.first_line(error)}") from error
    autoencoder = diffusers.VQModel if architecture.vae == "vqvae" else diffusers.AutoencoderKL
    # SDXL's VAE says of itself that it overflows in float16
    upcast = dtype == torch.float16 and config_of(folder, architecture.vae).get("force_upcast", False)
    vae = network(autoencoder, folder / architecture.vae, torch.float32 if upcast else dtype, **weights)
    decoder = None
    if settings.decoder is not None:
        small: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        decoder = network(diffusers.AutoencoderTiny, decoder_folder(settings), **small)
    return {
        "denoiser": denoiser,
        "vae": vae,
        "encoders": _encoders(folder, architecture, dtype, weights, what),
        "schedule": schedule,
        "decoder": decoder,
    }


def _encoders(
    folder: Path, architecture: Architecture, dtype: torch.dtype, weights: dict[str, Any], what: str
) -> list[TextEncoder]:
    import transformers

    found = []
    for name, tokenizer_name in architecture.encoders:
        if not (folder / name).is_dir():  # `folder_of` knows which may be absent
            continue
        cls: Any
        if name == "text_encoder_3":
            cls, reads = transformers.T5EncoderModel, "last"
        elif architecture.name == "sd":
            cls, reads = transformers.CLIPTextModel, "last"
        else:
            projected = architecture.name == "sd3" or name == "text_encoder_2"
            cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
            reads = "penultimate"
        tokenizer = tokenizer_of(folder / tokenizer_name)
        longest = StableDiffusion3.T5_TOKENS if name == "text_encoder_3" else tokenizer.model_max_length
        model = cls.from_pretrained(folder / name, dtype=dtype, **weights)
        found.append(TextEncoder(model, tokenizer, reads, longest, what))  # type: ignore[arg-type]
    return found


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a text encoder: T5's for the third one of SD3, CLIP's for all others."""
    import transformers

    cls: Any = transformers.T5TokenizerFast if folder.name == "tokenizer_3" else transformers.CLIPTokenizer
    return cls.from_pretrained(folder, local_files_only=True)


def schedule_of(folder: Path, architecture: Architecture, what: str) -> Schedule:
    """The schedule that the checkpoint's scheduler config describes. Raises `UserError` for others."""
    from diffusers import DDIMScheduler

    config = config_of(folder, "scheduler")
    if "flow" in architecture.provides:
        if config.get("use_dynamic_shifting"):
            raise UserError(
                f"{what}: its scheduler shifts by resolution (use_dynamic_shifting); a fixed shift is"
            )
        return Flow(config.get("num_train_timesteps", 1000), config.get("shift", 1.0))
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"{what}: its prediction_type is {kind}; epsilon and v_prediction are supported")
    if config.get("timestep_spacing", "leading") not in SPACINGS:
        raise UserError(
            f"{what}: its timestep_spacing is {config['timestep_spacing']}; {_listed(SPACINGS)} are supported"
        )
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return Diffusion(kind, scheduler.alphas_cumprod, config)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _zeros_for_no_words(folder: Path) -> bool:
    index = folder / "model_index.json"
    # the default is that of diffusers' pipeline
    return not index.is_file() or bool(
        json.loads(index.read_bytes()).get("force_zeros_for_empty_prompt", True)
    )


class BackboneFacts:
    """`stages.contract.Facts` of a backbone, from its config and tokenizer files."""

    def __init__(self, settings: BackboneSettings):
        self._settings = settings

    @cached_property
    def _folder(self) -> Path:
        return folder_of(self._settings)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self._folder, f"backbone {self._settings.model}")

    @cached_property
    def timesteps(self) -> int:
        return config_of(self._folder, "scheduler").get("num_train_timesteps", 1000)

    @cached_property
    def _tokenizers(self) -> list[Any]:
        present = [name for _, name in self.architecture.encoders if (self._folder / name).is_dir()]
        return [tokenizer_of(self._folder / name) for name in present]

    @property
    def max_tokens(self) -> int:
        return min((tokenizer.model_max_length for tokenizer in self._tokenizers), default=0)

    def tokens(self, text: str) -> tuple[str, ...]:
        return max((tuple(each.tokenize(text)) for each in self._tokenizers), key=len, default=())

    def is_piece(self, text: str) -> bool:
        pieces = (text, f"{text}</w>", f"▁{text}")  # CLIP's and T5's whole words
        return any(piece in each.get_vocab() for each in self._tokenizers for piece in pieces)


def native_size(settings: BackboneSettings) -> int:
    """Side of the backbone's images in pixels, from its config files alone."""
    folder = folder_of(settings)
    return sizes(folder, architecture_of(folder, f"backbone {settings.model}"))[1]
