"""Image classifiers: a timm network in a folder with config.json and model.safetensors.

config.json holds `architecture` (timm's name), `args` (of timm.create_model), `classes` in the order of the
logits, `image_size` in pixels, and `mean` and `std` of the pixels on [0, 1]. The whole image is scored: short
side to the input size and the centre square, without the extra crop of timm's evaluation.

What such a network sees before its last layer is of use without the classes: a folder of which only features
are asked for needs no `classes`.

Shape letters: B batch, h w image, K classes, E features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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


class TimmNetwork:
    """Looks at image tensors as they are: in [-1, 1], of any size, with gradient."""

    def __init__(self, model: Any, config: Mapping[str, Any], fingerprint: str, device: torch.device):
        self._model = model.to(device).eval().requires_grad_(False)
        self._size = config["image_size"]
        self._mean, self._std = (
            torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std")
        )
        self.fingerprint = fingerprint

    def features(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Tensor:
        """What the last layer is given: (B, E), unless the settings of the network say otherwise."""
        return self._model.forward_head(
            self._model.forward_features(self._normalised(image_B3hw)), pre_logits=True
        )

    def _normalised(self, image_B3hw: Tensor) -> Tensor:
        pixels_B3ss = (resize_crop(image_B3hw, self._size) + 1) / 2
        return (pixels_B3ss - self._mean) / self._std


class TimmClassifier(TimmNetwork):
    """The same network, with names for its logits."""

    def __init__(self, model: Any, config: Mapping[str, Any], fingerprint: str, device: torch.device):
        super().__init__(model, config, fingerprint, device)
        self.classes = tuple(config["classes"])

    def logits(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B K"]:
        return self._model(self._normalised(image_B3hw))


N = TypeVar("N", bound=TimmNetwork)


def load_classifier(model: str, device: torch.device) -> TimmClassifier:
    classifier = _load(TimmClassifier, model, f"classifier {model}", device)
    if len(classifier.classes) != classifier._model.num_classes:
        raise UserError(
            f"classifier {model}: {_folder(model) / 'config.json'} names {len(classifier.classes)} classes, "
            f"the network has {classifier._model.num_classes}"
        )
    return classifier


def load_network(model: str, device: torch.device) -> TimmNetwork:
    """The network of a classifier's folder, for its features."""
    return _load(TimmNetwork, model, f"extractor {model}", device)


def _load(cls: type[N], model: str, what: str, device: torch.device) -> N:
    folder = _folder(model, what)
    with _told(what, folder):
        with torch.inference_mode(False):
            network, config = _network(folder)
            network.load_state_dict(load_file(folder / "model.safetensors"))
        return cls(network, config, classifier_fingerprint(model, what), device)


def feature_size(model: str) -> int:
    """How many features `load_network(model, …)` gives, without its weights."""
    what = f"extractor {model}"
    folder = _folder(model, what)
    with _told(what, folder), torch.device("meta"):
        return int(_network(folder)[0].head_hidden_size)


def _network(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The network of a folder before its weights are loaded, and its config."""
    import timm

    config = json.loads((folder / "config.json").read_bytes())
    return timm.create_model(config["architecture"], pretrained=False, **config["args"]), config


@contextmanager
def _told(what: str, folder: Path) -> Iterator[None]:
    """What is wrong with a folder, as one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{what}: {folder / 'config.json'} lacks {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded: {files.first_line(error)}") from error


def classifier_classes(model: str) -> tuple[str, ...]:
    """`load_classifier(model, …).classes`, from the config file alone."""
    path = _folder(model) / "config.json"
    try:
        return tuple(json.loads(path.read_bytes())["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"classifier {model}: {path} has no list of classes") from error


def class_index(target: str, classes: Sequence[str], model: str) -> int:
    """Where a class stands among the model's; names are compared without case, "_" and "-" as spaces."""
    folded = [_fold(name) for name in classes]
    if _fold(target) not in folded:
        raise UserError(
            f"the classifier {model} does not know the class {target!r}; it knows {', '.join(classes)}"
        )
    return folded.index(_fold(target))


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def classifier_fingerprint(model: str, what: str | None = None) -> str:
    """`load_classifier(model, …).fingerprint`, from the bytes of the files alone. Errors are about `what`."""
    folder = _folder(model, what)
    return fingerprint({"files": files.hashes(folder, [folder / name for name in FILES])})


def _folder(model: str, what: str | None = None) -> Path:
    if model == "tangram":
        return files.tangram() / "classifier"
    folder = Path(model).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"unknown classifier {model!r}; give tangram, or a folder with {' and '.join(FILES)}")
    files.need(folder, FILES, what or f"classifier {model}")
    return folder
