"""The DAG of a candidate, on one screen.

    reference seeds ─► combine ─► refine ─► generate ─► encode ─► (part) ─► decode ─► filter ─► (scores)
    random noise ────────┘           ▲          ▲                                     measure
    class artifacts ─────────────────┴──────────┤
    source images ──────────────────────────────┘

A batch always has the same shape: rows that are finished, poisoned or not asked for are filled by a dummy,
and no row depends on its neighbours or its slot. So a candidate's bytes depend on its identity alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import BuildConfig, Recipe, method_of
from pipeline.device import Returning
from pipeline.plan import StreamPlan
from pipeline.seeds import Seeds
from schemas.errors import UserError
from schemas.ids import random_stream, sha256
from schemas.records import Combination, Reference
from schemas.tables import SIGNATURE
from stages import images
from stages.contract import DUMMY, Backbone, Chance, Generated, Material, Models, Order, Pairwise

# Entered for what the device does; what is done with images on the CPU stays outside, so that another thread
# may have the device meanwhile.
Computing = Callable[[str], AbstractContextManager[None]]  # for the stage of this name


def at_once(stage: str) -> AbstractContextManager[None]:
    """The device is nobody else's."""
    return nullcontext()


# An image whose values vary less than this (standard deviation, of 255) shows nothing.
FLAT = 1.0


class CandidateFault(Exception):
    """A candidate came to nothing: its image is not finite, or flat."""


@dataclass(frozen=True)
class Candidate:
    """A finished candidate: its encoded image and how it came to be."""

    index: int
    image: bytes
    width: int
    height: int
    combination: Combination | None
    combined_norm: float | None  # |z|/√d of the seed as it was combined, before it is refined
    parents_cosine: float | None  # mean over pairs of the combined seeds: 0 when they are independent
    losses: Sequence[float]
    seed_sha256: str
    seed_norm: float
    prompt: str
    source: Reference | None  # whose image it started from
    noise_ratio: float | None
    trace: Sequence[float]  # what the method of generating decided by


@dataclass(frozen=True)
class Materials:
    """What the candidates of a stream are made from."""

    seeds: Seeds | None
    artifacts: Mapping[str, Mapping[str, Tensor]]  # kind of stage → its class artifact
    read: Callable[[Sequence[Reference]], Tensor]  # images (N, 3, h, w) of references, on the CPU


class Dag:
    """The stages of one recipe on one backbone."""

    def __init__(self, config: BuildConfig, recipe: Recipe, backbone: Backbone, models: Models):
        self.rng_seed, self.encoding = config.rng_seed, (config.shard.image, config.shard.quality)
        self.recipe, self.backbone, self.models = recipe, backbone, models
        self.combine = method_of("combine", recipe.combine) if recipe.combine else None
        self.refine = method_of("refine", recipe.refine) if recipe.refine else None
        self.generate = method_of("generate", recipe.generate)

    def run(
        self,
        stream: StreamPlan,
        materials: Materials,
        slots: Sequence[int | None],
        computing: Computing = at_once,
    ) -> dict[int, Candidate | CandidateFault]:
        """Make the candidates in `slots`, one device batch; None is a dummy. Index → candidate or fault."""
        combinations = [self.combination(stream, materials, i) for i in slots]
        sources = [self.source(stream, i) for i in slots]
        source_B3hw = self._source_images(materials, sources) if stream.sources else None
        sampler = self.generate.sampler()
        with computing("combine"):
            seeds = [self.seed(stream, materials, i, c) for i, c in zip(slots, combinations, strict=True)]
            z_BCHW = torch.stack(seeds).to(self.backbone.device)
            combined_norm = [norm_ratio(z_CHW) for z_CHW in seeds]
        losses: Sequence[Sequence[float]] = [()] * len(slots)
        if self.refine is not None:
            with computing("refine"):
                order = self._order("refine", stream, materials, slots, z_BCHW)
                refined = self.refine(self.backbone, self.models, order, sampler)
                z_BCHW, losses = refined.z_BCHW, refined.losses
        with computing("generate"):
            generated = self.draw(stream, materials, slots, z_BCHW, source_B3hw)
            image_B3hw = generated.image_B3hw
            finite_B = torch.isfinite(image_B3hw).flatten(1).all(1)
            shown = Returning(finite_B, images.to_pixels(image_B3hw.nan_to_num()), z_BCHW.float())
        finite_B, pixels, z_BCHW = shown.wait()
        pixels_Bhw3 = pixels.numpy()

        made: dict[int, Candidate | CandidateFault] = {}
        good: list[int] = []
        for slot, index in enumerate(slots):
            if index is None:
                continue
            if not finite_B[slot]:
                made[index] = CandidateFault("the image is not finite")
            elif (deviation := float(pixels_Bhw3[slot].std())) < FLAT:
                made[index] = CandidateFault(f"the image is flat (deviation {deviation:.2f} < {FLAT} of 255)")
            else:
                good.append(slot)
        files = images.encode_all([pixels_Bhw3[slot] for slot in good], *self.encoding)
        for slot, file in zip(good, files, strict=True):
            index = slots[slot]
            assert index is not None
            z_CHW, chosen, known = z_BCHW[slot].contiguous(), combinations[slot], materials.seeds
            made[index] = Candidate(
                index=index,
                image=file,
                width=pixels_Bhw3.shape[2],
                height=pixels_Bhw3.shape[1],
                combination=chosen,
                combined_norm=combined_norm[slot] if chosen else None,
                parents_cosine=known.correlation(chosen.parents) if chosen and known else None,
                losses=losses[slot],
                seed_sha256=sha256(z_CHW.numpy().tobytes()),
                seed_norm=norm_ratio(z_CHW),
                prompt=generated.prompts[slot] if generated.prompts else stream.prompt,
                source=sources[slot],
                noise_ratio=generated.noise_ratios[slot] if generated.noise_ratios else None,
                trace=generated.traces[slot] if generated.traces else (),
            )
        return made

    def draw(
        self,
        stream: StreamPlan,
        materials: Materials,
        slots: Sequence[int | None],
        z_BCHW: Tensor,
        source_B3hw: Tensor | None = None,
    ) -> Generated:
        """What the recipe's last stage makes of seeds and source images."""
        source_B3hw = None if source_B3hw is None else source_B3hw.to(self.backbone.device)
        order = self._order("generate", stream, materials, slots, z_BCHW, source_B3hw)
        return self.generate(self.backbone, self.models, order)

    def _order(
        self,
        kind: str,
        stream: StreamPlan,
        materials: Materials,
        slots: Sequence[int | None],
        z_BCHW: Tensor,
        source_B3hw: Tensor | None = None,
    ) -> Order:
        """What a stage is to make of a batch, with randomness and artifact of its own."""
        return Order(
            target=stream.question.target,
            prompt=stream.prompt,
            z_BCHW=z_BCHW,
            chances=[self.chance(stream, kind, i) for i in slots],
            source_B3hw=source_B3hw,
            artifact=materials.artifacts.get(kind, {}),
        )

    def prepare(
        self,
        stream: StreamPlan,
        kind: str,
        read: Callable[[Sequence[Reference]], Tensor],
        seeds: Seeds | None,
    ) -> dict[str, Tensor]:
        """What a stage makes once from the references of a class."""
        if kind == "combine":
            assert seeds is not None
            assert self.combine is not None
            return self.combine.prepare(self.inverter(stream), read(seeds.references), seeds.z_KCHW)
        material = Material(
            image_N3hw=read(stream.references).to(self.backbone.device),
            target=stream.question.target,
            prompt=stream.prompt,
            # of the artifact alone: streams of other builds share it
            chance=Chance(0, ("artifact", stream.artifacts[kind])),
        )
        return getattr(self, kind).prepare(self.backbone, self.models, material)

    def inverter(self, stream: StreamPlan) -> Callable[[Tensor], Tensor]:
        """Inverts any number of images as the recipe inverts its references, in its device batches."""
        assert self.recipe.invert is not None  # Recipe fills it in
        invert = method_of("invert", self.recipe.invert)

        def run(image_N3hw: Tensor) -> Tensor:
            latents = []
            for batch in image_N3hw.split(stream.batch):
                padding = torch.zeros(stream.batch - len(batch), *batch.shape[1:])
                image_B3hw = torch.cat([batch, padding]).to(self.backbone.device)
                z_BCHW = invert(self.backbone, image_B3hw, stream.prompt).z_BCHW
                latents.append(z_BCHW[: len(batch)].float().cpu())
            return torch.cat(latents)

        return run

    def combination(self, stream: StreamPlan, materials: Materials, index: int | None) -> Combination | None:
        """Which reference seeds candidate `index` combines; None for noise and dummies."""
        if self.combine is None or index is None:
            return None
        assert materials.seeds is not None
        return self.combine.draw(self.chance(stream, "combine", index), len(materials.seeds.references))

    def chance(self, stream: StreamPlan, stage: str, index: int | None) -> Chance:
        """The randomness of a candidate in one stage."""
        if index is None:
            return DUMMY
        return Chance(index, (self.rng_seed, stage, stream.target, stream.recipe))

    def source(self, stream: StreamPlan, index: int | None) -> Reference | None:
        """The image that candidate `index` starts from: each once in an order by chance, then all again."""
        if index is None or not stream.sources:
            return None
        turn, place = divmod(index, len(stream.sources))
        order = self.chance(stream, "source", index).shared(turn).permutation(len(stream.sources))
        return stream.sources[order[place]]

    def _source_images(self, materials: Materials, sources: Sequence[Reference | None]) -> Tensor:
        """Their images, float32 (B, 3, h, w) on the CPU; grey for dummies."""
        image_N3hw = materials.read([source for source in sources if source is not None])
        image_B3hw = torch.zeros(len(sources), *image_N3hw.shape[1:])
        image_B3hw[[source is not None for source in sources]] = image_N3hw
        return image_B3hw

    def seed(
        self, stream: StreamPlan, materials: Materials, index: int | None, chosen: Combination | None
    ) -> Tensor:
        """z_T of a candidate, float32 (C, H, W) on the CPU."""
        if chosen is not None:
            assert materials.seeds is not None
            assert self.combine is not None
            z_KCHW = materials.seeds.z_KCHW[list(chosen.parents)]
            return self.combine(z_KCHW, chosen.weights, materials.artifacts.get("combine", {})).float()
        identity = (
            ("dummy",) if index is None else (self.rng_seed, "noise", stream.target, stream.recipe, index)
        )
        noise = random_stream(*identity).standard_normal(self.backbone.latent_shape, dtype=np.float32)
        return torch.from_numpy(noise)


def norm_ratio(z_CHW: Tensor) -> float:
    """|z| / √d: 1 for typical noise."""
    return float(z_CHW.double().norm() / z_CHW.numel() ** 0.5)


def score(
    stream: StreamPlan,
    models: Models,
    encoded: Sequence[bytes | memoryview | None],
    chosen: Any,
    computing: Computing = at_once,
    artifact: Mapping[str, Tensor] | None = None,
) -> dict[str, list[Any]]:
    """Scores of a part's images by one filter, computed on the decoded bytes; None for failed candidates."""
    signature = tuple(SIGNATURE) if isinstance(chosen, Pairwise) else ()
    columns: dict[str, list[Any]] = {name: [] for name in (*chosen.columns(), *signature)}
    question = replace(stream.question, artifact=artifact or {})
    for batch in in_batches(encoded, stream.batch):
        pixels = [None if data is None else images.decode(data) for data in batch]
        size = next((p.size for p in pixels if p is not None), None)
        if size is None:
            scores: Mapping[str, Sequence[Any]] = {name: [0.0] * len(batch) for name in columns}
        else:
            blank = torch.zeros(3, size[1], size[0])
            image_B3hw = torch.stack([blank if p is None else images.to_tensor(p, min(size)) for p in pixels])
            with computing("filter"):
                scores = chosen.score(models, image_B3hw, question)
        for name, column in columns.items():
            kept = [s if name in signature else float(s) for s in scores[name]]
            column += [None if p is None else s for p, s in zip(pixels, kept, strict=True)]
    return columns


def in_batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def out_of_memory(stream: StreamPlan, error: Exception) -> UserError | None:
    """What to tell the user when the device's memory did not suffice; None for any other error."""
    lacking = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    if lacking or "can't allocate memory" in str(error):
        if stream.batch == 1:
            return UserError(
                f"recipe {stream.recipe!r}: out of memory at batch 1; use a device with more memory,"
                " backbone.dtype bfloat16 or float16, or a smaller model"
            )
        smaller = max(n for n in range(1, stream.batch) if stream.unit % n == 0)
        return UserError(
            f"recipe {stream.recipe!r}: out of memory at batch {stream.batch};"
            f" set recipes.{stream.recipe}.batch={smaller} (which makes other images)"
        )
    return None
