"""The models of a worker beside its backbone: each is loaded once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import Lock

import torch

from stages.backbones.captioner import captioner_fingerprint, load_captioner
from stages.backbones.classifier import classifier_classes, classifier_fingerprint, load_classifier
from stages.backbones.clip import clip_fingerprint, load_clip
from stages.backbones.device import default_device
from stages.backbones.extractor import extractor_fingerprint, extractor_size, load_extractor
from stages.backbones.safety_checker import load_safety_checker, safety_checker_fingerprint
from stages.contract import (
    Backbone,
    Captioner,
    ClipModel,
    FeatureExtractor,
    ImageClassifier,
    ModelKind,
    SafetyChecker,
)

FINGERPRINTS: dict[ModelKind, Callable[[str], str]] = {
    "captioner": captioner_fingerprint,
    "clip": clip_fingerprint,
    "classifier": classifier_fingerprint,
    "extractor": extractor_fingerprint,
    "safety_checker": safety_checker_fingerprint,
}


class LoadedModels:
    """`stages.contract.Models` on one device."""

    def __init__(self, device: torch.device | None = None, backbone: Backbone | None = None):
        device = device or default_device()
        self._backbone = backbone
        self._lock = Lock()
        self._clip = cache(lambda model: load_clip(model, device))
        self._classifier = cache(lambda model: load_classifier(model, device))
        self._captioner = cache(lambda model: load_captioner(model, device))
        self._safety_checker = cache(lambda model: load_safety_checker(model, device))
        self._extractor = cache(lambda model: load_extractor(model, device, self._clip))

    def backbone(self) -> Backbone:
        assert self._backbone is not None, "a plan has no backbone"
        return self._backbone

    def clip(self, model: str) -> ClipModel:
        with self._lock:
            return self._clip(model)

    def classifier(self, model: str) -> ImageClassifier:
        with self._lock:
            return self._classifier(model)

    def captioner(self, model: str) -> Captioner:
        with self._lock:
            return self._captioner(model)

    def classes(self, model: str) -> tuple[str, ...]:
        return classifier_classes(model)

    def extractor(self, model: str) -> FeatureExtractor:
        with self._lock:
            return self._extractor(model)

    def feature_size(self, model: str) -> int | None:
        return extractor_size(model)

    def safety_checker(self, model: str) -> SafetyChecker:
        with self._lock:
            return self._safety_checker(model)

    def fingerprint(self, kind: ModelKind, model: str) -> str:
        return FINGERPRINTS[kind](model)
