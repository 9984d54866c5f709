"""A small convolutional network that evaluations train from scratch, in seconds on one CPU thread.

Long-tailed training: cross-entropy with the logarithm of each class's share of the training images added to
its logit is Balanced Softmax (Ren et al., NeurIPS 2020, Eq. 3), which is the logit-adjusted loss of Menon et
al. (ICLR 2021, Eq. 10) at τ = 1. Their other form takes τ times the same from the logits of a network that
was trained without (Eq. 9).

Shape letters: N images, K classes, h w image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from jobs.tangram.data import to_model
from jobs.train.classifier import log_prior
from schemas.ids import random_stream, sha256

Augmentation = Literal["none", "weak", "strong", "mixup", "cutmix"]
Loss = Literal["cross-entropy", "balanced softmax"]

SIDE = 32
WIDTHS = (24, 48, 96, 96)
BATCH = 64
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.05
SHIFT = 0.125  # of the side, at most, to each side
BRIGHTNESS, CONTRAST = 0.3, 0.3
LEAST_SCALE = 0.8


@dataclass(frozen=True)
class Images:
    """Images of SIDE × SIDE pixels with their classes."""

    pixels_N3hw: UInt8[Tensor, "N 3 h w"]
    label_N: Int[Tensor, " N"]

    def counts(self, classes: int) -> list[int]:
        return torch.bincount(self.label_N, minlength=classes).tolist()

    def key(self) -> str:
        """What names these images, in this order, with these classes."""
        said = (self.pixels_N3hw, self.label_N)
        return sha256(b"".join(part.numpy().tobytes() for part in said))[:16]

    def and_also(self, other: Images) -> Images:
        return Images(
            torch.cat([self.pixels_N3hw, other.pixels_N3hw]), torch.cat([self.label_N, other.label_N])
        )


def network(classes: int) -> nn.Module:
    """Four convolutions, each with batch norm and halved after it; the mean of what they find; a layer."""
    layers: list[nn.Module] = []
    for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Conv2d(before, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))


def train(
    images: Images,
    classes: int,
    *,
    loss: Loss,
    augmentation: Augmentation,
    epochs: int,
    rng_seed: int,
) -> nn.Module:
    """A network trained on images: AdamW, one cycle, equal bits for equal arguments and threads."""
    rng = torch.Generator().manual_seed(int(random_stream("small network", rng_seed).integers(2**31)))
    with torch.random.fork_rng():  # weights, and torchvision's MixUp, know no generator
        torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        model = network(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        strength = 1.0 if loss == "balanced softmax" else 0.0
        shift_K = strength * log_prior(images.counts(classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        steps = epochs * -(-len(images.label_N) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        augment, mix = _augment(augmentation), _mix(augmentation, classes)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(images.label_N), generator=rng).split(BATCH):
                image_B3hw = augment(to_float(images.pixels_N3hw[rows]))
                image_B3hw, target_B = mix(image_B3hw, images.label_N[rows])
                value = F.cross_entropy(model(image_B3hw) + shift_K, target_B)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> Float[Tensor, "N K"]:
    """What a trained network says of images."""
    return torch.cat([model(to_float(chunk)) for chunk in images.pixels_N3hw.split(256)])


def adjusted(logit_NK: Float[Tensor, "N K"], prior_K: Float[Tensor, " K"]) -> Float[Tensor, "N K"]:
    """Logits less the log prior of the training images: Menon et al., Eq. 9, with τ = 1."""
    return logit_NK - prior_K


def accuracy_of_classes(logit_NK: Float[Tensor, "N K"], images: Images) -> np.ndarray:
    """Share of each class's images (K) that is recognised."""
    right_N = (logit_NK.argmax(1) == images.label_N).double()
    classes = logit_NK.shape[1]
    summed_K = torch.zeros(classes, dtype=torch.float64).index_add_(0, images.label_N, right_N)
    return (summed_K / torch.tensor(images.counts(classes)).clamp(min=1)).numpy()


def shrink(picture: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """An RGB picture as SIDE × SIDE pixels."""
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def to_float(pixels_B3hw: UInt8[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 h w"]:
    """From 0 … 255 to -1 … 1, channels last in memory."""
    return to_model(pixels_B3hw).contiguous(memory_format=torch.channels_last)


def _augment(name: Augmentation) -> Callable[[Tensor], Tensor]:
    """Weak: flip and shift; strong: also turned by any angle, smaller, of other brightness and contrast."""

    def moved(image_B3hw: Tensor, strong: bool) -> Tensor:
        b = len(image_B3hw)
        angle_B = torch.rand(b) * 2 * math.pi if strong else torch.zeros(b)
        scale_B = 1 / (LEAST_SCALE + (1 - LEAST_SCALE) * torch.rand(b)) if strong else torch.ones(b)
        flip_B = torch.randint(0, 2, (b,)) * 2.0 - 1
        shift_B2 = (torch.rand(b, 2) * 2 - 1) * 2 * SHIFT  # the side is 2
        cos_B, sin_B = angle_B.cos() * scale_B, angle_B.sin() * scale_B
        x_B3 = torch.stack([cos_B * flip_B, -sin_B, shift_B2[:, 0]], 1)
        y_B3 = torch.stack([sin_B * flip_B, cos_B, shift_B2[:, 1]], 1)
        grid = F.affine_grid(torch.stack([x_B3, y_B3], 1), list(image_B3hw.shape), align_corners=False)
        image_B3hw = F.grid_sample(image_B3hw, grid, padding_mode="border", align_corners=False)
        if strong:
            contrast_B, brightness_B = torch.rand(2, b, 1, 1, 1) * 2 - 1
            image_B3hw = image_B3hw * (1 + CONTRAST * contrast_B) + BRIGHTNESS * brightness_B
            image_B3hw = image_B3hw.clamp(-1, 1)
        return image_B3hw

    if name == "none":
        return lambda image_B3hw: image_B3hw
    return lambda image_B3hw: moved(image_B3hw, name == "strong")


def _mix(name: Augmentation, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MixUp (ICLR 2018) and CutMix (ICCV 2019) of a batch, with mixed targets; else as it is."""
    if name == "mixup":
        return v2.MixUp(alpha=0.2, num_classes=classes)
    if name == "cutmix":
        return v2.CutMix(alpha=1.0, num_classes=classes)
    return lambda image_B3hw, label_B: (image_B3hw, label_B)
