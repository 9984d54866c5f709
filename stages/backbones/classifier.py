"""Image classifiers: a timm network in a folder with config.json and model.safetensors.

config.json holds `architecture` (timm's name), `args` (of timm.create_model), `classes` in the order of the
logits, `image_size` in pixels, and `mean` and `std` of the pixels on [0, 1]. The whole image is scored: short
side to the input size and the centre square, without the extra crop of timm's evaluation.

Shape letters: B batch, h w image, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files
from stages.backbones.resize import resize_crop

FILES = ("config.json", "model.safetensors")


class TimmClassifier:
    """Scores image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(self, model: Any, config: Mapping[str, Any], fingerprint: str, device: torch.device):
        self._model = model.to(device).eval().requires_grad_(False)
        self._size = config["image_size"]
        self._mean, self._std = (
            torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self.classes = tuple(config["classes"])
        self.fingerprint = fingerprint

    def logits(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B K"]:
        pixels_B3ss = (resize_crop(image_B3hw, self._size) + 1) / 2
        return self._model((pixels_B3ss - self._mean) / self._std)


def load_classifier(model: str, device: torch.device) -> TimmClassifier:
    import timm

    folder = _folder(model)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        with torch.inference_mode(False):
            network = timm.create_model(config["architecture"], pretrained=False, **config["args"])
            network.load_state_dict(load_file(folder / "model.safetensors"))
        classifier = TimmClassifier(network, config, classifier_fingerprint(model), device)
    except KeyError as error:
        raise UserError(f"classifier {model}: {folder / 'config.json'} lacks {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"classifier {model} cannot be loaded: {files.first_line(error)}") from error
    if len(classifier.classes) != network.num_classes:
        raise UserError(
            f"classifier {model}: {folder / 'config.json'} names {len(classifier.classes)} classes, "
            f"the network has {network.num_classes}"
        )
    return classifier


def classifier_classes(model: str) -> tuple[str, ...]:
    """`load_classifier(model, …).classes`, from the config file alone."""
    path = _folder(model) / "config.json"
    try:
        return tuple(json.loads(path.read_bytes())["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"classifier {model}: {path} has no list of classes") from error


def classifier_fingerprint(model: str) -> str:
    """`load_classifier(model, …).fingerprint`, from the bytes of the files alone."""
    folder = _folder(model)
    return fingerprint({"files": files.hashes(folder, [folder / name for name in FILES])})


def _folder(model: str) -> Path:
    if model == "tangram":
        return files.tangram() / "classifier"
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"unknown classifier {model!r}; give tangram, or a folder with {' and '.join(FILES)}")
    files.need(folder, FILES, f"classifier {model}")
    return folder
