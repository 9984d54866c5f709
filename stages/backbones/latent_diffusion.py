"""Latent diffusion models in the ordinary diffusers folder layout: tangram, Stable Diffusion 1.x and 2.x.

Weights are read as safetensors only, and no code that comes with a model is ever run.

Shape letters: B batch, C H W latent, h w image, L D text tokens and width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from schemas.settings import Settings
from stages.backbones import files
from stages.backbones.device import default_device
from stages.contract import Backbone

COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
CONFIGS = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)


class BackboneSettings(Settings):
    """Which diffusion model draws the images."""

    model: str = Field(default="tangram", min_length=1)
    """tangram (embedded), a local folder in the diffusers layout, or an id on the Hugging Face hub."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; its default branch when not set."""
    variant: str | None = None
    """Variant of the weight files, such as fp16 for diffusion_pytorch_model.fp16.safetensors."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks. The sampler always computes in float32."""


def load_backbone(settings: BackboneSettings, device: torch.device | None = None) -> Backbone:
    """The backbone, on the given or the default device."""
    import transformers
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    what, folder = f"backbone {settings.model}", _folder(settings)
    dtype = getattr(torch, settings.dtype)
    weights: Any = {"use_safetensors": True, "local_files_only": True, "variant": settings.variant}
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.inference_mode(False):
            parts = {
                "unet": UNet2DConditionModel.from_pretrained(
                    folder / "unet", torch_dtype=dtype, low_cpu_mem_usage=False, **weights
                ),
                "vae": AutoencoderKL.from_pretrained(
                    folder / "vae", torch_dtype=dtype, low_cpu_mem_usage=False, **weights
                ),
                "text_encoder": transformers.CLIPTextModel.from_pretrained(
                    folder / "text_encoder", dtype=dtype, **weights
                ),
                "tokenizer": transformers.CLIPTokenizer.from_pretrained(
                    folder / "tokenizer", local_files_only=True
                ),
                "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
            }
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{what} cannot be loaded from {folder}: {files.first_line(error)}") from error
    return LatentDiffusion(
        **parts, fingerprint=backbone_fingerprint(settings), device=device or default_device(), what=what
    )


def backbone_fingerprint(settings: BackboneSettings) -> str:
    """`load_backbone(settings).fingerprint`, from the bytes of the files alone."""
    folder = _folder(settings)
    used = [
        file
        for component in COMPONENTS
        for file in (folder / component).iterdir()
        if file.suffix in (".json", ".txt") or _is_weights(file, settings.variant)
    ]
    return fingerprint({"files": files.hashes(folder, used), "dtype": settings.dtype})


def _is_weights(file: Path, variant: str | None) -> bool:
    """Whether a weight file belongs to the variant: model.fp16.safetensors, model.fp16-00001-of-00002.…"""
    if file.suffix != ".safetensors":
        return False
    _, dot, infix = file.stem.partition(".")
    return not dot if variant is None else infix == variant or infix.startswith(f"{variant}-")


def _folder(settings: BackboneSettings) -> Path:
    """Where the files lie on this machine; a hub id is downloaded if it is not in the cache yet."""
    what = f"backbone {settings.model}"
    local = Path(settings.model).expanduser()
    if settings.revision is not None and (settings.model == "tangram" or local.is_dir()):
        raise UserError(f"{what}: revision {settings.revision} given, but only a hub id has revisions")
    if settings.model == "tangram":
        folder = files.tangram()
    elif local.is_dir():
        folder = local.resolve()
    elif local.is_absolute() or settings.model[0] in ".~" or settings.model.count("/") != 1:
        raise UserError(
            f"{what}: no such folder; give tangram, a local folder, or a hub id such as owner/name"
        )
    else:
        folder = _download(settings.model, settings.revision, settings.variant)
    files.need(folder, CONFIGS, what)
    for component in ("text_encoder", "unet", "vae"):
        if not any(_is_weights(file, settings.variant) for file in (folder / component).iterdir()):
            wanted = f"*.{settings.variant}.safetensors" if settings.variant else "*.safetensors"
            raise UserError(f"{what}: {folder / component} has no {wanted}")
    return folder


@lru_cache
def _download(model: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    infix = f".{variant}*" if variant else ""
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[
                f"{component}/{name}"
                for component in COMPONENTS
                for name in ("*.json", "*.txt", f"*{infix}.safetensors")
            ],
            ignore_patterns=None if variant else ["*.*.safetensors"],
        )
    except Exception as error:  # the hub client raises its own, httpx's and the system's
        raise UserError(
            f"backbone {model} is neither a local folder nor to be had from the Hugging Face hub "
            f"(revision {revision or 'default'}): {files.first_line(error)}"
        ) from error
    return Path(folder)


class LatentDiffusion:
    """A UNet in the latent space of a VAE, conditioned on a CLIP text encoder."""

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        fingerprint: str,
        device: torch.device,
        what: str,
    ):
        _check(unet, vae, scheduler, what)
        self._unet, self._vae, self._text_encoder = (
            part.to(device).eval().requires_grad_(False) for part in (unet, vae, text_encoder)
        )
        self._tokenizer, self._what = tokenizer, what
        self._scale = vae.config.scaling_factor
        self._shift = getattr(vae.config, "shift_factor", None) or 0.0
        self._embed = lru_cache(maxsize=256)(self._embed_uncached)
        self.fingerprint = fingerprint
        self.device, self.dtype = device, unet.dtype
        side = unet.config.sample_size
        self.latent_shape = (unet.config.in_channels, side, side)
        self.image_size = side * 2 ** (len(vae.config.block_out_channels) - 1)
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.final_alpha_cumprod = float(scheduler.final_alpha_cumprod)
        self.timestep_spacing = scheduler.config.timestep_spacing
        self.steps_offset = scheduler.config.steps_offset

    def embed(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        return torch.cat([self._embed(prompt) for prompt in prompts])

    def _embed_uncached(self, prompt: str) -> Tensor:
        """One prompt at a time, so that its embedding depends on no other."""
        longest = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            prompt, padding="max_length", max_length=longest, return_tensors="pt"
        ).input_ids
        if tokens.shape[1] > longest:
            raise UserError(
                f"prompt of {tokens.shape[1]} tokens given, {self._what} reads {longest}: shorten {prompt!r}"
            )
        with torch.no_grad():
            return self._text_encoder(tokens.to(self.device))[0]

    def embed_words(self, prompt: str, words: Mapping[str, Float[Tensor, "B D"]]) -> Float[Tensor, "B L D"]:
        """The words' vectors take the place of rows of the embedding table, which itself is never touched."""
        batch = len(next(iter(words.values())))
        ids, places = self._ids_around(prompt, tuple(words))
        ids_BL = torch.tensor([ids], device=self.device).expand(batch, -1)

        def put(_module: Any, _inputs: Any, output_BLD: Tensor) -> Tensor:
            output_BLD = output_BLD.clone()
            for place, word in places.items():
                output_BLD[:, place] = words[word].to(output_BLD.dtype)
            return output_BLD

        hook = self._text_encoder.get_input_embeddings().register_forward_hook(put)
        try:
            return self._text_encoder(ids_BL)[0]
        finally:
            hook.remove()

    def _ids_around(self, prompt: str, words: tuple[str, ...]) -> tuple[list[int], dict[int, str]]:
        """The tokens of a prompt, with one that does not matter for each of `words`, and where those are."""
        for word in words:
            if word not in prompt:
                raise UserError(f"the prompt {prompt!r} does not have the word {word!r}")
        tokenizer, stand_in = self._tokenizer, self._tokenizer.bos_token_id
        ids, places = [tokenizer.bos_token_id], {}
        for part in re.split(f"({'|'.join(map(re.escape, words))})", prompt):
            if part in words:
                places[len(ids)] = part
                ids.append(stand_in)
            else:
                ids += tokenizer(part, add_special_tokens=False).input_ids
        ids.append(tokenizer.eos_token_id)
        if len(ids) > (longest := tokenizer.model_max_length):
            raise UserError(
                f"prompt of {len(ids)} tokens given, {self._what} reads {longest}: shorten {prompt!r}"
            )
        return ids + [tokenizer.pad_token_id] * (longest - len(ids)), places

    def word(self, text: str | None) -> Float[Tensor, " D"]:
        table_VD = self._text_encoder.get_input_embeddings().weight
        if text is None:
            return table_VD.float().mean(dim=0)
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"{text!r} is {len(ids)} tokens of {self._what}; give a word of one token")
        return table_VD[ids[0]].float().clone()

    def predict(
        self, z_BCHW: Float[Tensor, "B C H W"], t: int, text_BLD: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B C H W"]:
        t_B = torch.full((len(z_BCHW),), t, device=self.device)
        output_BCHW = self._unet(z_BCHW.to(self.dtype), t_B, encoder_hidden_states=text_BLD).sample
        return output_BCHW.to(z_BCHW.dtype)

    def encode(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B C H W"]:
        posterior = self._vae.encode(image_B3hw.to(self.dtype)).latent_dist
        return (posterior.mean.to(image_B3hw.dtype) - self._shift) * self._scale

    def decode(self, z_BCHW: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
        latent_BCHW = z_BCHW / self._scale + self._shift
        return self._vae.decode(latent_BCHW.to(self.dtype)).sample.to(z_BCHW.dtype)


def _check(unet: Any, vae: Any, scheduler: Any, what: str) -> None:
    """Refuse relatives of the architecture that would load and then draw nonsense."""
    if unet.config.addition_embed_type is not None:
        raise UserError(
            f"{what}: its UNet has added conditions, as SDXL's; Stable Diffusion 1.x and 2.x are supported"
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"{what}: the UNet reads {unet.config.in_channels} channels, the VAE gives "
            f"{vae.config.latent_channels} (an inpainting or depth model?); give a text-to-image model"
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{what}: its prediction_type is {scheduler.config.prediction_type}; "
            "epsilon and v_prediction are supported"
        )
    if scheduler.config.timestep_spacing not in ("leading", "trailing", "linspace"):
        raise UserError(
            f"{what}: its timestep_spacing is {scheduler.config.timestep_spacing}; "
            "leading, trailing and linspace are supported"
        )


class BackboneFacts:
    """`stages.contract.Facts` of a backbone, from its config and tokenizer files."""

    def __init__(self, settings: BackboneSettings):
        self._settings = settings

    @cached_property
    def timesteps(self) -> int:
        config = json.loads((_folder(self._settings) / "scheduler/scheduler_config.json").read_text())
        return config.get("num_train_timesteps", 1000)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        folder = _folder(self._settings) / "tokenizer"
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    @property
    def max_tokens(self) -> int:
        return self._tokenizer.model_max_length

    def tokens(self, text: str) -> tuple[str, ...]:
        return tuple(self._tokenizer.tokenize(text))

    def is_piece(self, text: str) -> bool:
        vocabulary = self._tokenizer.get_vocab()
        return text in vocabulary or f"{text}</w>" in vocabulary


def native_size(settings: BackboneSettings) -> int:
    """Side of the backbone's images in pixels, from its config files alone."""
    folder = _folder(settings)
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
