"""Sets of images for inversion: drawings as in training, of rare classes, and what is no drawing at all.

Only images that ship inside installed packages are used, nothing is downloaded: photographs of scikit-image
and scikit-learn, scikit-learn's handwritten digits, scikit-image's close-ups of surfaces, random textures.

Shape letters: N images, h w image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from jobs.tangram.drawings import COUNTS, HEAD, MIDDLE, RARE, SIZE, draw, generator
from schemas.errors import UserError
from schemas.ids import random_stream
from stages import images

SPLIT = "evaluation"  # nothing was ever trained on it
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket", "motorcycle_left")
SURFACES = ("brick", "grass", "gravel")
OF_DRAWINGS = "a photo of a {class}"  # the default prompt of builds
OF_OTHERS = ""  # no class of the model is in them


@dataclass(frozen=True)
class ImageSet:
    """Images with what they were taken from: crops of one photograph are one source."""

    name: str
    image_N3hw: Float[Tensor, "N 3 h w"]
    prompts: tuple[str, ...]
    sources: tuple[str, ...]

    def first(self, count: int) -> ImageSet:
        """`count` images, taken in turn from the sources."""
        seen: dict[str, int] = {}
        turns = []
        for place, source in enumerate(self.sources):
            seen[source] = seen.get(source, 0) + 1
            turns.append((seen[source], place))
        rows = sorted(place for _, place in sorted(turns)[:count])
        return ImageSet(
            self.name, self.image_N3hw[rows], tuple(self.prompts[i] for i in rows),
            tuple(self.sources[i] for i in rows),
        )  # fmt: skip


def training_drawings(count: int) -> ImageSet:
    """Drawings of the training set itself, in its proportions of classes."""
    return _drawn("training drawings", "train", _proportional(count, random_stream("training drawings")))


def image_sets(count: int) -> list[ImageSet]:
    """The sets that are inverted, `count` images of each."""
    rng = random_stream("image sets")
    return [
        _drawn("drawings as in training", SPLIT, _proportional(count, rng)),
        *(
            _drawn(f"drawings, {name} classes", SPLIT, [classes[i % len(classes)] for i in range(count)])
            for name, classes in (("head", HEAD), ("middle", MIDDLE), ("rare", RARE))
        ),
        _crops("photographs", _photographs(), count),
        _crops("surfaces", _packaged(SURFACES), count),
        _digits(count),
        _textures(count),
    ]


def _proportional(count: int, rng: np.random.Generator) -> list[str]:
    share = np.array(list(COUNTS.values())) / sum(COUNTS.values())
    return [str(label) for label in rng.choice(list(COUNTS), size=count, p=share)]


def _drawn(name: str, split: str, labels: Sequence[str]) -> ImageSet:
    pictures, used = [], dict.fromkeys(labels, 0)
    # seed 2: neither the real drawings of the other evaluations nor their control
    rng_seed = 0 if split == "train" else 2
    for label in labels:
        pictures.append(
            images.to_tensor(draw(label, generator(split, label, used[label], rng_seed))[0], SIZE)
        )
        used[label] += 1
    prompts = tuple(OF_DRAWINGS.replace("{class}", label.replace("_", " ")) for label in labels)
    return ImageSet(name, torch.stack(pictures), prompts, tuple(f"{name} {i}" for i in range(len(labels))))


def _crops(name: str, pictures: Mapping[str, Image.Image], count: int) -> ImageSet:
    """Squares of half to all of the shorter side, at random places, in turn from each picture."""
    rng, tensors, sources = random_stream("crops", name), [], []
    for number in range(count):
        source = list(pictures)[number % len(pictures)]
        picture = pictures[source]
        side = int(min(picture.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        tensors.append(images.to_tensor(picture.crop((left, top, left + side, top + side)), SIZE))
        sources.append(source)
    return ImageSet(name, torch.stack(tensors), (OF_OTHERS,) * count, tuple(sources))


def _photographs() -> dict[str, Image.Image]:
    found = _packaged(PHOTOGRAPHS)
    for name in ("china.jpg", "flower.jpg"):
        found[name] = _opened(_package("sklearn") / "datasets" / "images" / name)
    return found


def _packaged(names: Sequence[str]) -> dict[str, Image.Image]:
    folder = _package("skimage") / "data"
    return {name: _opened(next(iter(sorted(folder.glob(f"{name}.*"))), folder / name)) for name in names}


def _package(name: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(
            "evaluate inversion takes its photographs from scikit-image and scikit-learn, which are not"
            " installed; run `pip install scikit-image scikit-learn`"
        )
    return Path(spec.origin).parent


def _opened(path: Path) -> Image.Image:
    try:
        return images.decode(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); install scikit-image and scikit-learn"
        ) from error


def _digits(count: int) -> ImageSet:
    """Handwritten digits of 8 × 8 pixels, enlarged; white on black, as they are kept."""
    _package("sklearn")
    from sklearn.datasets import load_digits

    rows = random_stream("digits").permutation(1797)[:count]
    grey_Nhw = (load_digits().images[rows] * (255 / 16)).astype(np.uint8)
    tensors = [
        images.to_tensor(
            Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"), SIZE
        )
        for grey in grey_Nhw
    ]
    return ImageSet("digits", torch.stack(tensors), (OF_OTHERS,) * count, tuple(f"digit {r}" for r in rows))


def _textures(count: int) -> ImageSet:
    """Gaussian noise blurred by 0 to 4 pixels, each colour by itself, spread over the range of pixels."""
    tensors = []
    for number in range(count):
        rng = random_stream("texture", number)
        blurred = gaussian_filter(
            rng.standard_normal((3, SIZE, SIZE)), (0, *(rng.uniform(0, 4),) * 2), mode="wrap"
        )
        tensors.append(torch.from_numpy((blurred / blurred.std() / 2).clip(-1, 1)).float())
    return ImageSet(
        "noise textures",
        torch.stack(tensors),
        (OF_OTHERS,) * count,
        tuple(f"texture {i}" for i in range(count)),
    )
