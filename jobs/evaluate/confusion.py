"""`seedloom evaluate confusion FILE`: which classes a classifier takes for one another.

A soft confusion matrix: `share` is the mean probability that the classifier gives to class `predicted` over
the references of class `class`. A good classifier hardly errs on images like those it learned from, but its
probabilities say all the same which classes lie near each other.
`targets: sources: {most_confused: K, matrix: FILE}` reads it; `--write-targets` makes the
next build's quotas of it (`jobs.evaluate.quotas`).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import ConfigFile, Overrides

if TYPE_CHECKING:
    from pipeline.config import BuildConfig

BATCH = 64


def confusion(
    file: ConfigFile,
    overrides: Overrides = None,
    classifier: Annotated[str, typer.Option(help="tangram, or a folder in timm's layout.")] = "tangram",
    out: Annotated[Path, typer.Option(help="The Parquet to write.")] = Path("confusion.parquet"),
    write_targets: Annotated[
        Path | None, typer.Option(help="YAML to write: weak classes and hard pairs as the next targets.")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Images that these targets ask for in all.")] = 100,
) -> None:
    """Write which classes of a config's references a classifier confuses, as Parquet."""
    import pyarrow as pa

    from jobs.evaluate.quotas import as_yaml, targets
    from pipeline.config import load
    from schemas.errors import UserError
    from stages.shard import parquet

    config = load(file, overrides or [])
    if config.references is None:
        raise UserError(f"{file}: has no `references`, whose classes could be confused")
    rows = shares(config, classifier)
    schema = pa.schema(
        [
            pa.field("class", pa.string(), nullable=False),
            pa.field("predicted", pa.string(), nullable=False),
            pa.field("share", pa.float64(), nullable=False),  # mean probability
            pa.field("images", pa.int64(), nullable=False),
        ]
    )
    out.write_bytes(parquet.write(rows, schema))
    others = [row for row in rows if row["class"] != row["predicted"]]
    for row in sorted(others, key=lambda row: -row["share"])[:10]:
        print(f"{row['class']} taken for {row['predicted']}: {row['share']:.4f}")
    print(out)
    if write_targets is not None:
        write_targets.write_text(as_yaml(targets(config, rows, images)), encoding="utf-8")
        print(write_targets)


def shares(config: BuildConfig, classifier: str) -> list[dict[str, Any]]:
    """The rows of the matrix over the references of a config. Raises `UserError` for an unknown class."""
    import numpy as np
    import torch

    from pipeline.config import method_of
    from stages import images
    from stages.backbones.classifier import class_index, load_classifier
    from stages.backbones.device import default_device
    from stages.backbones.diffusion.load import native_size
    from stages.read.admit import admit

    assert config.references is not None
    device, size = default_device(), native_size(config.backbone)
    model, read = load_classifier(classifier, device), method_of("read", config.references)
    label_of = {r.origin: r.label for r in admit(read.items(), config.references).admitted}
    labels, names = sorted(set(label_of.values())), list(model.classes)
    for label in labels:
        names[class_index(config.readable(label), model.classes, classifier)] = label
    total, count = {label: np.zeros(len(names)) for label in labels}, dict.fromkeys(labels, 0)
    items = (item for item in read.items() if item.origin in label_of)
    while batch := list(islice(items, BATCH)):
        pixels = [images.to_tensor(images.decode(item.read()), size) for item in batch]
        with torch.no_grad():
            share_BK = model.logits(torch.stack(pixels).to(device)).double().softmax(dim=1).cpu().numpy()
        for item, share_K in zip(batch, share_BK, strict=True):
            total[item.label] += share_K
            count[item.label] += 1
    return [
        {"class": label, "predicted": name, "share": float(share) / count[label], "images": count[label]}
        for label in labels
        for name, share in zip(names, total[label], strict=True)
    ]
