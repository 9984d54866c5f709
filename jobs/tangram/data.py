"""Data sets of drawings as arrays, made from (split, seed) alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from jobs.tangram.drawings import CLASSES, COUNTS, Attributes, draw, generator


@dataclass(frozen=True)
class Drawings:
    """N drawings: pixels (N, 3, 64, 64) uint8, labels (N,) as positions in CLASSES, and what each shows."""

    pixels: torch.Tensor
    labels: torch.Tensor
    attributes: tuple[Attributes, ...]


def drawings(split: str, counts: dict[str, int], rng_seed: int = 0) -> Drawings:
    """Draw counts[shape] pictures of each shape, in class order."""
    images, labels, attributes = [], [], []
    for shape, count in counts.items():
        for index in range(count):
            image, what = draw(shape, generator(split, shape, index, rng_seed))
            images.append(np.asarray(image))
            labels.append(CLASSES.index(shape))
            attributes.append(what)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Drawings(pixels, torch.tensor(labels), tuple(attributes))


def long_tail() -> Drawings:
    """What VAE and UNet learn from: COUNTS pictures per class."""
    return drawings("train", COUNTS)


def balanced(split: str, per_class: int, rng_seed: int = 0) -> Drawings:
    """The same number of every class."""
    return drawings(split, dict.fromkeys(CLASSES, per_class), rng_seed)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float -1..1."""
    return pixels.float() / 127.5 - 1.0


def epoch_batch(count: int, batch: int, step: int, part: str, rng_seed: int) -> torch.Tensor:
    """Positions (batch,) of a step when every epoch visits each of `count` items once, in an own order."""
    from jobs.tangram.training import step_generator

    per_epoch = max(1, count // batch)
    epoch, turn = divmod(step, per_epoch)
    order = torch.randperm(count, generator=step_generator(f"{part}/order", rng_seed, epoch))
    return order[turn * batch : (turn + 1) * batch]
