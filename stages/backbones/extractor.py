"""Feature extractors: networks by whose features images are compared.

- tangram: the embedded classifier, before its last layer;
- clip:NAME: the image features of a CLIP model, NAME as `stages.backbones.clip` knows it;
- timm:NAME, hf-hub:owner/name, or a folder, of a timm network as `stages.backbones.classifier` knows them,
  before its last layer (its classes need no names);
- package.module:factory: a callable without arguments that returns a torch.nn.Module from images in [-1, 1],
  of the backbone's size, to features (`stages.backbones.own` says more).

Features come as they are: not normalised, of any size, with gradient where the network has one.

Shape letters: B batch, h w image, E features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from stages.backbones import classifier, files, hub, own
from stages.backbones.clip import clip_feature_size, clip_fingerprint
from stages.contract import ClipModel, FeatureExtractor

CLIP = "clip:"
ALLOWED = (
    f"give tangram, {CLIP}NAME, a folder with {' and '.join(classifier.FILES)}, {classifier.TIMM}NAME,"
    f" {hub.PREFIX}owner/name, or package.module:factory"
)


class Extractor:
    """A network of which one thing is known: images in, a row of features for each out."""

    def __init__(self, name: str, fingerprint: str, see: Callable[[Tensor], Any]):
        self._name, self._see = name, see
        self.fingerprint = fingerprint

    def features(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B E"]:
        what = f"extractor {self._name}"
        return own.rows(self._see(image_B3hw), len(image_B3hw), what, "features", "images")


def load_extractor(model: str, device: torch.device, clip: Callable[[str], ClipModel]) -> Extractor:
    """An extractor by its name; `clip` loads CLIP models, which others may share."""
    kind, name = _parse(model)
    if kind == "clip":
        loaded = clip(name)
        return Extractor(model, loaded.fingerprint, loaded.encode_image)
    if kind == "folder":
        network = classifier.load_network(name, device)
        return Extractor(model, network.fingerprint, network.features)
    module = own.on_device(_module(name), device)
    return Extractor(model, extractor_fingerprint(model), lambda image_B3hw: module(image_B3hw.to(device)))


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
    if (
        model == "tangram"
        or model.startswith((classifier.TIMM, hub.PREFIX))
        or Path(model).expanduser().is_dir()
    ):
        return "folder", model
    if ":" in model:
        return "module", model
    raise UserError(f"unknown extractor {model!r}; {ALLOWED}")


def _module(path: str) -> torch.nn.Module:
    module = own.make(path, f"extractor {path!r}", ALLOWED)
    if not isinstance(module, torch.nn.Module):
        raise UserError(
            f"extractor {path!r} gives a {type(module).__name__}; it must be a callable without arguments"
            " that gives a torch.nn.Module"
        )
    return module


@cache
def _module_fingerprint(path: str) -> str:
    """A module must be made to be asked, so it is asked once."""
    return own.identity(path, _module(path), f"extractor {path!r}")
