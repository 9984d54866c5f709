"""Feature extractors: networks by whose features images are compared.

- tangram: the embedded classifier, before its last layer;
- clip:NAME: the image features of a CLIP model, NAME as `stages.backbones.clip` knows it;
- a folder in the layout of `stages.backbones.classifier`, before its last layer (`classes` may be missing);
- package.module:factory: a callable without arguments that returns a torch.nn.Module from images in [-1, 1],
  of the backbone's size, to features. It must be the same network each time. Nobody can tell from outside
  when its weights change: its identity is its import path and, where it has one, its attribute `fingerprint`
  (a string), which should change with them.

Features come as they are: not normalised, of any size, with gradient where the network has one.

Shape letters: B batch, h w image, E features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import classifier, files
from stages.backbones.clip import clip_feature_size, clip_fingerprint
from stages.contract import ClipModel, FeatureExtractor

CLIP = "clip:"
ALLOWED = (
    f"give tangram, {CLIP}NAME, a folder with {' and '.join(classifier.FILES)}, or package.module:factory"
)


class Extractor:
    """A network of which one thing is known: images in, a row of features for each out."""

    def __init__(self, name: str, fingerprint: str, see: Callable[[Tensor], Any]):
        self._name, self._see = name, see
        self.fingerprint = fingerprint

    def features(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]:
        found = self._see(image_B3hw)
        if not isinstance(found, Tensor):
            given = f"a {type(found).__name__}"
        elif found.ndim != 2 or len(found) != len(image_B3hw) or not found.is_floating_point():
            given = f"{found.dtype} of shape {tuple(found.shape)}".removeprefix("torch.")
        else:
            return found
        raise UserError(
            f"extractor {self._name}: gives {given} for {len(image_B3hw)} images;"
            " it must give a row of features for each, floating-point numbers of shape (images, features)"
        )


def load_extractor(model: str, device: torch.device, clip: Callable[[str], ClipModel]) -> Extractor:
    """An extractor by its name; `clip` loads CLIP models, which others may share."""
    kind, name = _parse(model)
    if kind == "clip":
        loaded = clip(name)
        return Extractor(model, loaded.fingerprint, loaded.encode_image)
    if kind == "folder":
        network = classifier.load_network(name, device)
        return Extractor(model, network.fingerprint, network.features)
    module = _module(name).to(device).eval().requires_grad_(False)
    return Extractor(model, extractor_fingerprint(model), module)


def extractor_fingerprint(model: str) -> str:
    """`load_extractor(model, …).fingerprint`, from the bytes of files or what a module says."""
    kind, name = _parse(model)
    if kind == "clip":
        return clip_fingerprint(name)
    if kind == "folder":
        return classifier.classifier_fingerprint(name, f"extractor {model}")
    return _module_fingerprint(name)


def extractor_size(model: str) -> int | None:
    """E, without the weights; None of a module, which alone knows."""
    kind, name = _parse(model)
    if kind == "clip":
        return clip_feature_size(name)
    return classifier.feature_size(name) if kind == "folder" else None


def probe(extractor: FeatureExtractor, name: str, image_3hw: Float[Tensor, "3 h w"]) -> None:
    """Let it look at two images; raise `UserError` when it cannot, or gives no row of features for each."""
    try:
        with torch.no_grad():
            extractor.features(image_3hw.expand(2, -1, -1, -1))
    except (UserError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a module of the user's own raises
        size = f"{image_3hw.shape[-1]} x {image_3hw.shape[-2]}"
        raise UserError(
            f"extractor {name}: fails on images of {size} pixels ({type(error).__name__}: "
            f"{files.first_line(error)}); mend it, or {ALLOWED}"
        ) from error


def _parse(model: str) -> tuple[Literal["clip", "folder", "module"], str]:
    if model.startswith(CLIP):
        return "clip", model.removeprefix(CLIP)
    if model == "tangram" or Path(model).expanduser().is_dir():
        return "folder", model
    if ":" in model:
        return "module", model
    raise UserError(f"unknown extractor {model!r}; {ALLOWED}")


def _module(path: str) -> torch.nn.Module:
    name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(
            f"extractor {path!r} cannot be imported ({files.first_line(error)}); {ALLOWED}"
        ) from error
    try:
        with torch.inference_mode(False):
            module = factory()
    except Exception as error:  # a user's own code
        raise UserError(
            f"extractor {path!r} cannot be made ({type(error).__name__}: {files.first_line(error)});"
            " it is called without arguments"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"extractor {path!r} gives a {type(module).__name__}; it must be a callable without arguments"
            " that gives a torch.nn.Module"
        )
    return module


@cache
def _module_fingerprint(path: str) -> str:
    """A module must be made to be asked, so it is asked once."""
    said = getattr(_module(path), "fingerprint", None)
    if not isinstance(said, str | None):
        raise UserError(
            f"extractor {path!r}: its fingerprint is a {type(said).__name__}; it must be a string"
        )
    return fingerprint({"module": path, "fingerprint": said})
