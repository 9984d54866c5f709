"""Image-text models.

- tangram: the embedded one;
- ARCHITECTURE/WEIGHTS: any that open_clip lists with safetensors weights;
- a folder, or hf-hub:owner/name (also with @revision): what open_clip saves (open_clip_config.json and
  open_clip_model.safetensors), or a CLIPModel that transformers saved (config.json and model.safetensors,
  with tokenizer and preprocessor_config.json). Where a place holds both, open_clip's is read;
- package.module:Class: a user's own (`stages.backbones.own`), which must offer encode_image of images in
  [-1, 1], of any size, and encode_text of a sequence of texts, a row of features for each, and `logit_scale`,
  the number that cosines are multiplied with (100 for most).

Weights are read as safetensors only, and no code that comes with a model is ever run. GPUs look at images in
half precision, except by a user's own model; features are float32 all the same.

Shape letters: B batch, h w image, E features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files, hub, own
from stages.backbones.device import tower_precision_on
from stages.backbones.pretrained import load_pretrained, map_weights, preprocessing_of
from stages.backbones.resize import Preprocessing

LOCAL = "local-dir:"
ALLOWED = (
    f"give tangram, a folder, {hub.PREFIX}owner/name, ARCHITECTURE/WEIGHTS such as"
    " ViT-B-32/laion2b_s34b_b79k, or package.module:Class"
)
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
TRANSFORMERS = ("config.json", "model.safetensors")
# The rule of `tower_precision_on`, for fingerprints: plans are made where no GPU is, and a part's environment
# says which device it was.
PRECISION = "float16 on GPUs"
SIDE = (".json", ".txt", ".model")  # suffixes of what is read beside weights


class Clip:
    """Scores image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(
        self,
        fingerprint: str,
        logit_scale: float,
        see: Callable[[Tensor], Tensor],
        read: Callable[[str], Tensor],
    ):
        self.fingerprint, self.logit_scale = fingerprint, logit_scale
        self._see = see
        self._read = lru_cache(maxsize=4096)(read)

    def encode_image(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]:
        return self._see(image_B3hw)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """One text at a time, so that its features do not depend on which others are asked for."""
        with torch.no_grad():
            return torch.cat([self._read(text) for text in texts])


def load_clip(model: str, device: torch.device, dtype: torch.dtype | None = None) -> Clip:
    """The model, its image tower in the given precision or that of the device."""
    dtype = dtype or tower_precision_on(device)
    what, identity = f"clip {model}", clip_fingerprint(model)  # says clearly what is wrong with a name
    kind, name = _parse(model)
    if kind == "own":
        return _own_clip(name, what, identity, device)
    with files.told(what):
        if kind == "listed":
            architecture, _, weights = name.partition("/")
            return _open_clip(architecture, weights, _listed_file(name), identity, device, dtype)
        folder = _folder(model)
        if (folder / OPEN_CLIP[0]).is_file():
            return _open_clip(f"{LOCAL}{folder}", None, folder / OPEN_CLIP[1], identity, device, dtype)
        return _transformers_clip(folder, what, identity, device, dtype)


def clip_fingerprint(model: str) -> str:
    """`load_clip(model, …).fingerprint`, from the bytes of the files alone, or what a user's own says."""
    kind, name = _parse(model)
    if kind == "own":
        return _own_fingerprint(name)
    if kind == "listed":
        file = _listed_file(name)
        architecture = name.partition("/")[0]
        return fingerprint(
            {
                "architecture": architecture,
                "files": list(files.hashes(file.parent, [file]).values()),
                "precision": PRECISION,
            }
        )
    folder = _folder(model)
    layout = OPEN_CLIP if (folder / OPEN_CLIP[0]).is_file() else TRANSFORMERS
    used = [file for file in folder.iterdir() if file.suffix in SIDE]
    return fingerprint({"files": files.hashes(folder, [*used, folder / layout[1]]), "precision": PRECISION})


def clip_feature_size(model: str) -> int | None:
    """How many features `encode_image` gives, without the weights; None: only a user's own model knows."""
    import open_clip

    kind, name = _parse(model)
    if kind == "own":
        return None
    if kind == "listed":
        config = open_clip.get_model_config(name.partition("/")[0])
        if config is None:
            raise UserError(f"unknown clip model {model!r}; {ALLOWED}")
        return int(config["embed_dim"])
    folder = _folder(model)
    with files.told(f"clip {model}"):
        if (folder / OPEN_CLIP[0]).is_file():
            return int(json.loads((folder / OPEN_CLIP[0]).read_bytes())["model_cfg"]["embed_dim"])
        return int(json.loads((folder / TRANSFORMERS[0]).read_bytes())["projection_dim"])


def _open_clip(
    name: str, weights: str | None, file: Path, identity: str, device: torch.device, dtype: torch.dtype
) -> Clip:
    import open_clip

    with torch.inference_mode(False):
        network = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(name)
    network = _ready(network, file, device)
    network.visual.to(dtype)
    cfg = network.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else min(cfg["size"])
    prepare = Preprocessing(size, cfg["mean"], cfg["std"], device)
    return Clip(
        identity,
        float(network.logit_scale.exp()),
        see=lambda image_B3hw: features(network.encode_image, prepare(image_B3hw), dtype),
        read=lambda text: network.encode_text(tokenizer([text]).to(device)),
    )


def _transformers_clip(
    folder: Path, what: str, identity: str, device: torch.device, dtype: torch.dtype
) -> Clip:
    import transformers

    kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    if kind != "clip":
        raise UserError(
            f"{what}: {folder} holds a transformers model of type {kind}; of these only clip is read, others"
            " as open_clip saves them"
        )
    network = load_pretrained(transformers.CLIPModel, folder, what)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    network, prepare = _ready(network, None, device), preprocessing_of(processor, what, device)
    for part in (network.vision_model, network.visual_projection):
        part.to(dtype)
    longest = network.config.text_config.max_position_embeddings

    def tower(pixels_B3ss: Tensor) -> Tensor:
        return network.get_image_features(pixels_B3ss).pooler_output

    def read(text: str) -> Tensor:
        tokens = tokenizer([text], truncation=True, max_length=longest, return_tensors="pt").to(device)
        return network.get_text_features(**tokens).pooler_output

    return Clip(
        identity,
        float(network.logit_scale.exp()),
        see=lambda image_B3hw: features(tower, prepare(image_B3hw), dtype),
        read=read,
    )


def features(
    tower: Callable[[Tensor], Tensor], pixels_B3ss: Float[Tensor, "B 3 s s"], dtype: torch.dtype
) -> Float[Tensor, "B E"]:
    """What a tower of some precision makes of pixels, in float32.

    Half precision has no small numbers, and gradients are small. So the gradient of each row goes through the
    tower times the power of two that brings it near 1 (Micikevicius et al., arXiv:1710.03740, per row).
    """
    found_BE = tower(pixels_B3ss.to(dtype)).float()
    if not found_BE.requires_grad or dtype == torch.float32:
        return found_BE
    exponents: list[Tensor] = []

    def enlarge(gradient_BE: Tensor) -> Tensor:
        exponent_B = torch.frexp(gradient_BE.abs().amax(dim=1)).exponent
        exponents.append(exponent_B.clamp(-100, 100))  # float32 has the powers of two up to 127
        return torch.ldexp(gradient_BE, -exponents[-1][:, None])

    found_BE.register_hook(enlarge)
    pixels_B3ss.register_hook(lambda gradient: torch.ldexp(gradient, exponents.pop()[:, None, None, None]))
    return found_BE


def _ready(network: Any, file: Path | None, device: torch.device) -> Any:
    if file is not None and device.type == "cpu":
        map_weights(network, file)
    return network.to(device).eval().requires_grad_(False)


def _own_clip(path: str, what: str, identity: str, device: torch.device) -> Clip:
    made = own.on_device(_own(path), device)
    try:
        scale = float(made.logit_scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: its logit_scale is no number: {files.first_line(error)}") from error

    def see(image_B3hw: Tensor) -> Tensor:
        return own.rows(made.encode_image(image_B3hw.to(device)), len(image_B3hw), what, "features", "images")

    def read(text: str) -> Tensor:
        return own.rows(made.encode_text([text]), 1, what, "features", "texts")

    return Clip(identity, scale, see, read)


def _own(path: str) -> Any:
    what = f"clip {path!r}"
    made = own.make(path, what, ALLOWED)
    own.need(made, ("encode_image", "encode_text"), ("logit_scale",), what)
    return made


@cache
def _own_fingerprint(path: str) -> str:
    """A model must be made to be asked, so it is asked once."""
    return own.identity(path, _own(path), f"clip {path!r}")


def _parse(model: str) -> tuple[Literal["folder", "hub", "listed", "own"], str]:
    if model == "tangram":
        return "folder", str(files.tangram() / "clip")
    if model.startswith(LOCAL):
        return "folder", model.removeprefix(LOCAL)
    if model.startswith(hub.PREFIX):
        return "hub", model.removeprefix(hub.PREFIX)
    if own.is_import_path(model):
        return "own", model
    if model[:1] in ("/", ".", "~") or Path(model).is_dir():
        return "folder", model
    if "/" in model:
        return "listed", model
    raise UserError(f"unknown clip model {model!r}; {ALLOWED}")


def _folder(model: str) -> Path:
    """Where the files lie on this machine: all those of one of the layouts, downloaded if need be."""
    kind, name = _parse(model)
    what = f"clip {model}"
    if kind == "hub":
        folder = hub.fetch(name, tuple(f"*{suffix}" for suffix in SIDE), what)
    else:
        folder = Path(name).expanduser().resolve()
        files.need(folder, (), what)
    layout = TRANSFORMERS
    if (folder / OPEN_CLIP[0]).is_file() or not (folder / TRANSFORMERS[0]).is_file():
        layout = OPEN_CLIP
    files.need(folder, layout[:1], what)
    if "trust_remote_code" in (folder / layout[0]).read_text("utf-8"):
        raise UserError(f"{what}: its configuration asks for trust_remote_code, which is never given")
    if kind == "hub":
        hub.fetch_weights(name, folder, layout[1], what)
    files.need(folder, layout, what)
    return folder


@cache
def _listed_file(name: str) -> Path:
    """The weights that open_clip lists under ARCHITECTURE/WEIGHTS, downloaded if need be."""
    import open_clip

    architecture, _, weights = name.partition("/")
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known:
        allowed = (
            f"weights of {architecture}: {', '.join(known)}"
            if known
            else f"{ALLOWED}; is it {hub.PREFIX}{name}?"
        )
        raise UserError(f"unknown clip model {name}; {allowed}")
    published = (open_clip.get_pretrained_cfg(architecture, weights) or {}).get("hf_hub", "")
    repository, file = os.path.split(published)
    if not repository:
        raise UserError(f"clip {name} is published as a pickle only, and pickles are never read; {ALLOWED}")
    # the name under which open_clip itself looks for safetensors
    file = f"{os.path.splitext(file)[0]}.safetensors" if file else OPEN_CLIP[1]
    folder = hub.fetch(repository, ("open_clip_config.json",), f"clip {name}")
    hub.fetch_weights(repository, folder, file, f"clip {name}")
    return folder / file
