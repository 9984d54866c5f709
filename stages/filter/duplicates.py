"""Duplicates filter: is the image one that the dataset has already?

Two signatures of an image are compared: the perceptual hash of its grey values (pHash: the signs of the 8 × 8
lowest frequencies of a DCT against their median; Zauner, Implementation and Benchmarking of Perceptual Image
Hash Functions, 2010), and the features of a network. An image is a duplicate of another when both are near:
hashes alone take two rings of different colours for one.

They are stored as scores. What is a duplicate of what is decided when a build selects (`pipeline.distinct`):
in the order of the accepted images, within a target, and against its references.

Shape letters: B images, N other images, E features, h w image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from schemas.records import Verdict
from schemas.settings import Settings
from stages import images, registry
from stages.contract import Models, Near, Pairwise, Question

# Products of many rows at once may round otherwise than those of two; whatever decides is computed of two.
ROUNDING = 1e-4


def perceptual_hash(image_B3hw: Float[Tensor, "B 3 h w"]) -> Int[np.ndarray, " B"]:
    """The 64 bits of each image as int64."""
    pixels_Bhw3 = images.to_uint8(image_B3hw)
    bits_B64 = np.stack([imagehash.phash(Image.fromarray(p)).hash.ravel() for p in pixels_Bhw3])
    return np.packbits(bits_B64, axis=1).view(">u8")[:, 0].astype(np.uint64).view(np.int64)


@registry.method("duplicates")
class Duplicates(Pairwise):
    """Rejects an image that is nearly an earlier accepted one of its target, or one of its references."""

    compares = "references"

    class Config(Settings):
        method: Literal["duplicates"] = "duplicates"
        model: str = "clip:tangram"
        """Extractor: tangram, clip:NAME, a folder, timm:NAME, hf-hub:owner/name, or
        package.module:factory."""
        bits: int | None = Field(10, ge=0, le=64)
        """Perceptual hashes that differ in at most so many of 64 bits are near; not asked for when null."""
        cosine: float | None = Field(0.995, ge=-1, le=1)
        """Features of at least this cosine are near; not asked for when null."""

        @model_validator(mode="after")
        def _one_at_least(self) -> Duplicates.Config:
            if self.bits is None and self.cosine is None:
                raise PydanticCustomError("said", "must set bits or cosine, or nothing is a duplicate")
            return self

    def models(self) -> Mapping[str, str]:
        return {"extractor": self.config.model}

    def scored(self) -> Mapping[str, Any]:
        return {"method": "duplicates", "model": self.config.model}

    def columns(self) -> tuple[str, ...]:
        return ()

    def prepare(self, models: Models, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> dict[str, Tensor]:
        found = [self._signature(models, image_B3hw) for image_B3hw in batches]
        return {
            "hash": torch.from_numpy(np.concatenate([hash_B for hash_B, _ in found])),
            "embedding": torch.cat([embedding_BE for _, embedding_BE in found]),
        }

    def score(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"], question: Question
    ) -> dict[str, list[Any]]:
        hash_B, embedding_BE = self._signature(models, image_B3hw)
        return {"hash": hash_B.tolist(), "embedding": embedding_BE.tolist()}

    def _signature(
        self, models: Models, image_B3hw: Float[Tensor, "B 3 h w"]
    ) -> tuple[Int[np.ndarray, " B"], Float[Tensor, "B E"]]:
        with torch.no_grad():
            feature_BE = models.extractor(self.config.model).features(image_B3hw)
        return perceptual_hash(image_B3hw), F.normalize(feature_BE.double(), dim=1).float().cpu()

    def decide(self, scores: Mapping[str, float]) -> Verdict:
        """An image alone is no duplicate."""
        return Verdict(True, "duplicates.candidate", 0, 0, "no duplicate of what was accepted before")

    def nearest(
        self,
        own_hash: int,
        own_E: Float[np.ndarray, " E"],
        hash_N: Int[np.ndarray, " N"],
        embedding_NE: Float[np.ndarray, "N E"],
    ) -> Near | None:
        """Of those with the highest cosine the first."""
        bits_N = np.bitwise_count((hash_N ^ np.int64(own_hash)).view(np.uint64)).astype(int)
        near_N = np.ones(len(hash_N), bool) if self.config.bits is None else bits_N <= self.config.bits
        places = np.flatnonzero(near_N)
        if self.config.cosine is not None and len(places):
            places = places[embedding_NE[places] @ own_E >= self.config.cosine - ROUNDING]
        cosines = {
            int(n): float((embedding_NE[n].astype(np.float64) * own_E.astype(np.float64)).sum())
            for n in places
        }
        if self.config.cosine is not None:
            cosines = {n: cosine for n, cosine in cosines.items() if cosine >= self.config.cosine}
        if not cosines:
            return None
        place = max(cosines, key=lambda n: (cosines[n], -n))
        reason = f"{bits_N[place]} of 64 bits differ, cosine {cosines[place]:.4g}"
        if self.config.cosine is not None:
            return Near(place, cosines[place], self.config.cosine, reason)
        assert self.config.bits is not None
        return Near(place, float(bits_N[place]), float(self.config.bits), reason)
