"""Image-text models through open_clip.

Shape letters: B batch, h w image, E features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files
from stages.backbones.resize import resize_crop

ALLOWED = "give tangram, local-dir:FOLDER, or ARCHITECTURE/WEIGHTS such as ViT-B-32/laion2b_s34b_b79k"
LOCAL = "local-dir:"


class OpenClip:
    """A model and its tokenizer. Scores image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str, device: torch.device):
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokenizer, self._device = tokenizer, device
        cfg = model.visual.preprocess_cfg
        self._size = cfg["size"] if isinstance(cfg["size"], int) else min(cfg["size"])
        self._mean, self._std = (
            torch.tensor(cfg[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self._encode = lru_cache(maxsize=4096)(self._encode_uncached)
        self.fingerprint = fingerprint
        self.logit_scale = float(model.logit_scale.exp())

    def encode_image(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]:
        pixels_B3ss = (resize_crop(image_B3hw, self._size) + 1) / 2
        return self._model.encode_image((pixels_B3ss - self._mean) / self._std)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        return torch.cat([self._encode(text) for text in texts])

    def _encode_uncached(self, text: str) -> Tensor:
        """One text at a time, so that its features do not depend on which others are asked for."""
        with torch.no_grad():
            return self._model.encode_text(self._tokenizer([text]).to(self._device))


def load_clip(model: str, device: torch.device) -> OpenClip:
    import open_clip

    identity = clip_fingerprint(model)  # first, because it says clearly what is wrong with a name
    name, weights = _parse(model)
    try:
        with torch.inference_mode(False):
            network = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"clip {model} cannot be loaded: {files.first_line(error)}") from error
    return OpenClip(network, tokenizer, identity, device)


def clip_fingerprint(model: str) -> str:
    """`load_clip(model, …).fingerprint`, from the bytes of the files alone."""
    name, weights = _parse(model)
    if weights is not None:
        file = _download(name, weights)
        return fingerprint({"architecture": name, "files": list(files.hashes(file.parent, [file]).values())})
    folder = Path(name.removeprefix(LOCAL))
    used = [file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".safetensors")]
    return fingerprint({"files": files.hashes(folder, used)})


def clip_feature_size(model: str) -> int:
    """How many features `load_clip(model, …).encode_image` gives, without the weights."""
    import open_clip

    name, weights = _parse(model)
    if weights is None:
        folder = Path(name.removeprefix(LOCAL))
        return int(json.loads((folder / "open_clip_config.json").read_bytes())["model_cfg"]["embed_dim"])
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"unknown clip model {model!r}; {ALLOWED}")
    return int(config["embed_dim"])


def _parse(model: str) -> tuple[str, str | None]:
    """The name that open_clip knows the model by, and its pretrained weights if the name does not say."""
    if model == "tangram":
        return f"{LOCAL}{files.tangram() / 'clip'}", None
    if model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL)).expanduser().resolve()
        files.need(folder, ["open_clip_config.json", "open_clip_model.safetensors"], f"clip {model}")
        if "trust_remote_code" in json.dumps(json.loads((folder / "open_clip_config.json").read_bytes())):
            raise UserError(
                f"clip {model}: its configuration asks for trust_remote_code, which is never given"
            )
        return f"{LOCAL}{folder}", None
    architecture, slash, weights = model.partition("/")
    if not slash:
        raise UserError(f"unknown clip model {model!r}; {ALLOWED}")
    return architecture, weights


@lru_cache
def _download(architecture: str, weights: str) -> Path:
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in known:
        allowed = f"weights of {architecture}: {', '.join(known)}" if known else ALLOWED
        raise UserError(f"unknown clip model {architecture}/{weights}; {allowed}")
    try:
        file = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, weights)))
    except Exception as error:  # the hub client raises its own, httpx's and the system's
        raise UserError(
            f"clip {architecture}/{weights} cannot be downloaded: {files.first_line(error)}"
        ) from error
    if file.suffix != ".safetensors":
        raise UserError(
            f"clip {architecture}/{weights} is published as {file.name}; only safetensors are read"
        )
    return file
