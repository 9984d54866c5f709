"""Captioners: models that say in words what an image shows.

tangram's is a comparison with phrases (`stages.backbones.tangram_captions`). All others are transformers
models that read an image and write a text (BLIP, GIT, a vision encoder with a decoder), in the library's
own folder layout. Weights are read as safetensors only, and no code that comes with a model is ever run.

Shape letters: h w image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files, hub
from stages.backbones.classifier import classifier_classes
from stages.backbones.clip import clip_fingerprint, load_clip
from stages.backbones.pretrained import load_pretrained
from stages.backbones.tangram_captions import TangramCaptioner
from stages.contract import Captioner
from stages.images import to_uint8

KINDS = (".json", ".txt", ".model", ".safetensors")  # files that a model is read from


class TransformersCaptioner:
    """A model with its image processor and tokenizer; writes what its own generation settings say."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, fingerprint: str, device: torch.device):
        self._model = model.to(device).eval().requires_grad_(False)
        self._processor, self._tokenizer, self._device = processor, tokenizer, device
        self.fingerprint = fingerprint

    def caption(self, image_3hw: Float[Tensor, "3 h w"]) -> str:
        pixels = self._processor(Image.fromarray(to_uint8(image_3hw[None])[0]), return_tensors="pt")
        with torch.no_grad():
            # never sampled: an image has one caption
            ids = self._model.generate(pixel_values=pixels.pixel_values.to(self._device), do_sample=False)
        return self._tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def load_captioner(model: str, device: torch.device) -> Captioner:
    identity = captioner_fingerprint(model)  # first, because it says clearly what is wrong with a name
    if model == "tangram":
        shapes = [name.replace("_", " ") for name in classifier_classes("tangram")]
        return TangramCaptioner(load_clip("tangram", device), shapes, identity)
    import transformers

    what, folder, safe = f"captioner {model}", _folder(model), {"trust_remote_code": False}
    with files.told(what, folder):
        network = load_pretrained(transformers.AutoModelForImageTextToText, folder, what, **safe)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, **safe)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **safe)
    return TransformersCaptioner(network, processor, tokenizer, identity, device)


def captioner_fingerprint(model: str) -> str:
    """`load_captioner(model, …).fingerprint`, from the bytes of the files alone."""
    if model == "tangram":
        return fingerprint({"phrases": 1, "clip": clip_fingerprint("tangram")})
    folder = _folder(model)
    used = [file for file in folder.iterdir() if file.suffix in KINDS]
    return fingerprint({"files": files.hashes(folder, used)})


def _folder(model: str) -> Path:
    """Where the files lie on this machine; a hub id is downloaded if it is not in the cache yet."""
    what = f"captioner {model}"
    folder = hub.local_folder(
        model,
        what,
        "give tangram, a local folder with a transformers image-to-text model, or a hub id such as"
        " Salesforce/blip-image-captioning-large",
    )
    if folder is None:
        folder = hub.fetch(model.removeprefix(hub.PREFIX), tuple(f"*{kind}" for kind in KINDS), what)
    files.need(folder, ["config.json"], what)
    if not any(file.suffix == ".safetensors" for file in folder.iterdir()):
        pickles = [file.name for file in folder.iterdir() if file.suffix in files.PICKLES]
        raise UserError(f"{what}: {folder} has no *.safetensors{files.only_pickled(pickles)}")
    return folder
