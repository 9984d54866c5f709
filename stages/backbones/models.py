"""The scoring models of a worker: each is loaded once, when first asked for."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Literal

import torch

from stages.backbones.classifier import classifier_classes, classifier_fingerprint, load_classifier
from stages.backbones.clip import clip_fingerprint, load_clip
from stages.backbones.device import default_device
from stages.contract import ClipModel, ImageClassifier


class LoadedModels:
    """`stages.contract.Models` on one device."""

    def __init__(self, device: torch.device | None = None):
        device = device or default_device()
        self._lock = Lock()
        self._clip = cache(lambda model: load_clip(model, device))
        self._classifier = cache(lambda model: load_classifier(model, device))

    def clip(self, model: str) -> ClipModel:
        with self._lock:
            return self._clip(model)

    def classifier(self, model: str) -> ImageClassifier:
        with self._lock:
            return self._classifier(model)

    def classes(self, model: str) -> tuple[str, ...]:
        return classifier_classes(model)

    def fingerprint(self, kind: Literal["clip", "classifier"], model: str) -> str:
        return clip_fingerprint(model) if kind == "clip" else classifier_fingerprint(model)
