"""`seedloom evaluate long-tail`: do generated images help a classifier with the classes that lack images?

A small network is trained from scratch on a long tail of images and judged on a balanced test set, by many,
medium and few classes (more than 100, 20 to 100, fewer than 20 training images: Liu et al., CVPR 2019), with
cross-entropy, Balanced Softmax and logit adjustment. Only the few classes are filled up, in every arm to the
same number: with repeated images, or with images of a build that saw nothing but the training images of the
few classes. All but `as it is` train with weak augmentation or more.

Filters are what such a setting really has: none, or a CLIP model that stands for a foundation model. The
embedded one learned from balanced drawings and so knows the few classes well. The own recipes are compared
with `--validation`, on images and with training seeds of their own, by the accuracy on the few classes with
cross-entropy; the test judges `OWN` alone.

Images are folders `train`, `validation` and `test` with a folder for each class: tangram's world, 500
drawings of the commonest class down to 5 of the rarest, or with --images any other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.evaluate import study
from schemas.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from jobs.evaluate.harness import Arm, Built, Result
    from jobs.evaluate.small_network import Augmentation, Images, Loss

SPLITS = ("train", "validation", "test")
FEW, MANY = 20, 100  # fewer: few; more: many
GROUPS = ("many", "medium", "few", "overall")
LOSSES = ("cross-entropy", "balanced softmax", "logit adjustment")
AS_IT_IS, REPEATED, PLAIN = "as it is", "repeated", "text-to-image"
CLIP = [{"method": "clip", "margin": 0.02}]
FILTERED = " + CLIP filter"

# Arms without generated images: how the images of the few classes are augmented.
REAL: dict[str, Augmentation] = {
    AS_IT_IS: "none",
    REPEATED: "weak",
    "repeated, strong": "strong",
    "repeated, MixUp": "mixup",
    "repeated, CutMix": "cutmix",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    most: int  # training images of the commonest class
    least: int
    held_out: int  # a class, for validation and for testing
    made: int  # images that each few class gets
    steps: int
    epochs: int
    seeds: int
    validation_seeds: int


FULL = Size(most=500, least=5, held_out=50, made=60, steps=20, epochs=15, seeds=5, validation_seeds=3)
QUICK = Size(most=120, least=10, held_out=2, made=2, steps=4, epochs=1, seeds=2, validation_seeds=2)


def recipes(steps: int) -> dict[str, dict[str, Any]]:
    """The ways of making images: those of the baselines, and the own ones."""

    def drawn(guidance: float) -> dict[str, Any]:
        return {"method": "text_to_image", "steps": steps, "guidance": guidance}

    def changed(ratio: str) -> dict[str, Any]:
        return {"method": "image_to_image", "steps": steps, "guidance": 3.0, "ratio": ratio}

    invert = {"method": "fixed_point", "steps": steps}
    path = {"method": "cog", "mode": "interpolation"}
    return {
        PLAIN: {"generate": drawn(3.0)},
        "image-to-image, low": {"generate": changed("low")},
        "image-to-image, high": {"generate": changed("high")},
        "COG": {"invert": invert, "combine": path, "generate": drawn(1.0)},
        "COG, guided": {"invert": invert, "combine": path, "generate": drawn(2.0)},
        "NAO": {"invert": invert, "combine": {"method": "nao", "points": 4}, "generate": drawn(1.0)},
    }


BASELINES = (PLAIN, "image-to-image, low", "image-to-image, high")
OWN = "COG"  # as in jobs/configs/few_shot.yaml, set before anything was measured


def long_tail(
    out: Annotated[Path, typer.Option(help="Folder of builds and results.")] = Path("out/evaluate/long_tail"),
    images: Annotated[
        Path | None, typer.Option(help="Folder with train, validation and test; tangram's world.")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Compare the own recipes on the validation split.")
    ] = False,
    runner: study.Runner = "ray",
    workers: study.Workers = "auto",
    quick: study.Quick = False,
) -> None:
    """Accuracy on many, medium and few classes, with and without generated images."""
    size = QUICK if quick else FULL
    world = images or _world(out / f"images_{size.most}_{size.least}", size)
    split = "validation" if validation else "test"
    classes, train, judged = _read(world, split)
    groups = grouped(train.counts(len(classes)))
    few = [classes[k] for k in groups["few"]]
    if not few:
        raise UserError(f"{world}/train: no class has fewer than {FEW} images; there is no tail to fill up")
    names = list(recipes(size.steps)) if validation else [*BASELINES, OWN]
    arms = [
        _arm(name + (FILTERED if chosen else ""), world, few, recipes(size.steps)[name], size, chosen)
        for name in names
        for chosen in ((), CLIP)
        if not name.startswith("image-to-image") or not chosen
    ]
    _conclude(
        out, f"long-tail{'-validation' if validation else ''}", arms, classes, groups, train, judged, size,
        seeds=range(1000, 1000 + size.validation_seeds) if validation else range(size.seeds),
        trained=("cross-entropy",) if validation else ("cross-entropy", "balanced softmax"),
        runner=runner, workers=workers,
    )  # fmt: skip


def grouped(counts: Sequence[int]) -> dict[str, list[int]]:
    """Positions of the classes that have many, medium and few training images, and of all."""
    return {
        "many": [k for k, n in enumerate(counts) if n > MANY],
        "medium": [k for k, n in enumerate(counts) if FEW <= n <= MANY],
        "few": [k for k, n in enumerate(counts) if n < FEW],
        "overall": list(range(len(counts))),
    }


def _world(folder: Path, size: Size) -> Path:
    """Tangram's long tail as image folders; no drawing is in two of them, or was ever trained on."""
    from jobs.tangram.drawings import CLASSES, write_drawings

    done = folder / "complete"
    if not done.exists():
        falls = [(size.least / size.most) ** (rank / (len(CLASSES) - 1)) for rank in range(len(CLASSES))]
        tail = {label: round(size.most * fall) for label, fall in zip(CLASSES, falls, strict=True)}
        even = dict.fromkeys(CLASSES, size.held_out)
        for split in SPLITS:
            write_drawings(folder / split, tail if split == "train" else even, f"long tail {split}")
        done.touch()
    return folder


def _read(world: Path, split: str) -> tuple[list[str], Images, Images]:
    """Class names, training images and those that judge. Raises `UserError`."""
    import torch
    from torchvision.datasets import ImageFolder

    from jobs.evaluate.small_network import Images, shrink

    found = []
    for part in ("train", split):
        try:
            folder = ImageFolder(str(world / part))
        except FileNotFoundError as error:
            raise UserError(f"--images {world}: {error}; give {', '.join(SPLITS)}") from None
        pixels = torch.stack([shrink(folder[i][0]) for i in range(len(folder))])
        found.append((folder.classes, Images(pixels, torch.tensor(folder.targets))))
    (classes, train), (others, judged) = found
    if classes != others:
        odd = sorted(set(classes) ^ set(others))[0]
        raise UserError(f"--images {world}: the class {odd!r} is not in both train and {split}")
    return classes, train, judged


def _arm(
    name: str, world: Path, few: list[str], recipe: Mapping[str, Any], size: Size, chosen: Sequence[Any]
) -> Arm:
    folder = (world / "train").absolute()
    return study.arm(
        name, folder, few, {**recipe, "unit": 16}, size.made, 8,
        target={"attempts": 12 if chosen else 1}, filter=list(chosen),
    )  # fmt: skip


# --- images -------------------------------------------------------------------------------------------------


def _repeated(train: Images, few: Sequence[int], count: int) -> Images:
    """The images of the few classes over again, `count` of each class."""
    import torch

    from jobs.evaluate.small_network import Images

    rows = []
    for k in few:
        own = (train.label_N == k).nonzero()[:, 0]
        rows.append(own[torch.arange(count) % len(own)])
    chosen = torch.cat(rows)
    return Images(train.pixels_N3hw[chosen], train.label_N[chosen])


def _made(store: Any, built: Built, classes: Sequence[str]) -> Images:
    import torch

    from jobs.evaluate.harness import read
    from jobs.evaluate.small_network import Images, shrink
    from stages import images

    rows = [(row["class"], shrink(images.decode(data))) for row, data in read(store, built)]
    labels = torch.tensor([classes.index(label) for label, _ in rows])
    return Images(torch.stack([pixels for _, pixels in rows]), labels)


# --- results ------------------------------------------------------------------------------------------------


def _conclude(
    out: Path,
    name: str,
    arms: Sequence[Arm],
    classes: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    train: Images,
    judged: Images,
    size: Size,
    *,
    seeds: range,
    trained: Sequence[Loss],
    runner: str,
    workers: str,
) -> None:
    from jobs.evaluate.report import Heading, write
    from jobs.evaluate.trainings import Training, accuracies

    store, built, building = study.make(arms, out, runner, workers)
    begin = time.monotonic()

    sets: dict[str, tuple[Images, Augmentation]] = {}
    again = train.and_also(_repeated(train, groups["few"], size.made))
    for title, augmentation in REAL.items():
        sets[title] = (train if title == AS_IT_IS else again, augmentation)
    for title, one in built.items():
        sets[title] = (train.and_also(_made(store, one, classes)), "weak")

    judges = judged.key()
    keys = {title: f"{images.key()}-{judges}-{how}" for title, (images, how) in sets.items()}
    trainings = [
        (title, Training(
            images, judged, len(classes), loss, how, size.epochs, seed,
            out / "runs" / f"{keys[title]}-{loss.split()[0]}-{size.epochs}-{seed}.npz",
        ))
        for loss in trained for seed in seeds for title, (images, how) in sets.items()
    ]  # fmt: skip
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    told = accuracies([training for _, training in trainings])
    for (title, _), by_loss in zip(trainings, told, strict=True):
        for loss_told, accuracy_K in by_loss.items():
            found.setdefault((loss_told, title), []).append(accuracy_K)
    took = time.monotonic() - begin
    ids = {title: one.manifest.build_id for title, one in built.items()}
    results = [
        _result(loss_told, found, list(sets), groups, ids)
        for loss_told in LOSSES
        if (loss_told, AS_IT_IS) in found
    ]
    counts = ", ".join(f"{group} {len(groups[group])}" for group in GROUPS[:3])
    files = write(
        out, name, results, {group: Heading(group, ".3f") for group in GROUPS},
        [
            f"Classes: {counts}; {len(train.label_N)} training images, {len(judged.label_N)} that judge; each"
            f" few class gets {size.made} more in every arm but {AS_IT_IS!r}.",
            f"Mean over {len(seeds)} training seeds, {seeds[0]} and up, with Student's 95 % interval;"
            " differences are paired by seed. Each arm has one build: the intervals say nothing of how builds"
            " differ. Filter: none, or a CLIP model that learned from balanced drawings.",
            f"{building}; training and judging: {took:.0f} s",
        ],
    )  # fmt: skip
    print("\n".join(map(str, files)))


def _result(
    loss: str,
    found: Mapping[tuple[str, str], Sequence[np.ndarray]],
    titles: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    ids: Mapping[str, str],
) -> Result:
    from jobs.evaluate.harness import Result
    from jobs.evaluate.metrics import difference, measure

    present = [group for group in GROUPS if groups[group]]
    by_seed = {
        (title, group): [a[list(groups[group])].mean() for a in found[loss, title]]
        for title in titles
        for group in present
    }
    rows = {title: {g: measure(by_seed[title, g]) for g in present} for title in titles}
    asked = [(title, other) for title in ids for other in (REPEATED, PLAIN) if title != other]
    differences = {
        (one, other, g): difference(by_seed[one, g], by_seed[other, g])
        for one, other in asked
        for g in present
    }
    return Result(loss, "accuracy on a balanced test set", rows, differences, ids)


if __name__ == "__main__":
    from jobs.entry import run

    run(long_tail)
