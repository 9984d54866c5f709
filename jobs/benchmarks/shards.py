"""`seedloom benchmark shards`: arrays to shards beside webdataset's own writer, and the speed of packing.

Pictures are crops of a photograph in colours of their own (scikit-image's astronaut), so that they compress
as photographs do. Three ways take turns:

- ours: encoded as a build encodes, side by side on threads and at its default quality, and put into a tar;
- ours, equal quality: the same at the lowest quality whose images are at least as near to the originals as
  those of webdataset's defaults;
- webdataset: `ShardWriter` with its defaults, given arrays, class, text and the same JSON.

All write the files to the same disk and wait for it. Quality is the peak signal-to-noise ratio of all pixels.
Packing is `pipeline.pack.write_shards` on a store of parts made for it: megabytes of shards a second, on one
worker.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.turns import footer, measured_on, table, take_turns, tell, timed

if TYPE_CHECKING:
    import numpy as np

OURS, EQUAL, THEIRS, PACKING = "ours", "ours, equal quality", "webdataset", "packing"
DEFAULT_QUALITY = 96
SEED = 19


def shards(
    samples: Annotated[int, typer.Option(min=2, help="Images in the shard.")] = 300,
    side: Annotated[int, typer.Option(min=8, help="Pixels along a side.")] = 512,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where shards are written; a temporary folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("shards.json"),
) -> None:
    """Compare our shards with webdataset's writer at equal quality: samples a second, bytes; and packing."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        facts = measure(samples, side, runs, Path(place))
    tell(facts, describe(facts), out)


def measure(samples: int, side: int, runs: int, folder: Path) -> dict[str, Any]:
    """Seconds, bytes and quality of each way."""
    import torch

    pictures = photographs(samples, side)
    theirs = folder / "theirs"
    _theirs(pictures, theirs)
    wanted = quality_of(pictures, theirs)
    equal = _lowest(pictures[: min(samples, 16)], quality_of(pictures[: min(samples, 16)], theirs))
    ways = {
        OURS: lambda: _ours(pictures, folder / "ours", DEFAULT_QUALITY),
        EQUAL: lambda: _ours(pictures, folder / "equal", equal),
        THEIRS: lambda: _theirs(pictures, theirs),
    }
    device = torch.device("cpu")
    turns = take_turns(ways, runs, device)
    places = {OURS: folder / "ours", EQUAL: folder / "equal", THEIRS: theirs}
    qualities = {
        OURS: quality_of(pictures, places[OURS]),
        EQUAL: quality_of(pictures, places[EQUAL]),
        THEIRS: wanted,
    }
    store, plan, tasks = _parts(folder / "store", pictures)

    def pack() -> int:
        from pipeline.pack import write_shards

        shutil.rmtree(folder / "store" / "builds", ignore_errors=True)
        written = 0
        for task in tasks:
            shards = write_shards(store, plan, task)
            assert isinstance(shards, tuple)
            written += sum(shard.tar_bytes + shard.parquet_bytes for shard in shards)
        return written

    packing = take_turns({PACKING: pack}, runs, device)[PACKING]
    return {
        "samples": samples,
        "size": side,
        "runs": runs,
        "quality": {OURS: DEFAULT_QUALITY, EQUAL: equal, THEIRS: "its default"},
        "ways": {
            name: {
                **turn.spread(),
                "samples_per_second": samples / turn.spread()["seconds"],
                "bytes": sum(file.stat().st_size for file in places[name].glob("*.tar")),
                "psnr": qualities[name],
                "faster": turn.faster(turns[THEIRS]),
            }
            for name, turn in turns.items()
        },
        "packing": {
            **packing.spread(),
            "samples": samples,
            "bytes": packing.result,
            "megabytes_per_second": packing.result / packing.spread()["seconds"] / 1e6,
        },
        **measured_on(device, "webdataset", "pillow", "pyarrow"),
    }


def photographs(samples: int, side: int) -> list[np.ndarray]:
    """uint8 RGB pictures, each another crop in other colours."""
    import numpy as np
    from PIL import Image
    from skimage import data

    rng = np.random.default_rng(SEED)
    whole = Image.fromarray(data.astronaut())
    made = []
    for _ in range(samples):
        edge = int(rng.integers(256, 513))
        left, top = (int(rng.integers(0, 513 - edge)) for _ in range(2))
        crop = whole.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
        pixels = np.asarray(crop)[:, :: (-1 if rng.random() < 0.5 else 1), rng.permutation(3)]
        made.append(np.ascontiguousarray(pixels))
    return made


def _described(number: int) -> dict[str, Any]:
    return {"class": "astronaut", "recipe": "benchmark", "stream": "0" * 20, "unit": 0, "index": number}


def _ours(pictures: Sequence[np.ndarray], folder: Path, quality: int) -> None:
    from pipeline.store import Store
    from stages.images import encode_all
    from stages.shard import sample, tar

    shutil.rmtree(folder, ignore_errors=True)
    members: dict[str, Any] = {}
    for number, image in enumerate(encode_all(pictures, "jpeg", quality)):
        members |= sample.members(f"{number:06d}", image, "jpeg", 0, "an astronaut", _described(number))
    pieces, _ = tar.pieces(members)
    Store(str(folder)).put_new("000000.tar", *pieces)


def _theirs(pictures: Sequence[np.ndarray], folder: Path) -> None:
    import webdataset

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=len(pictures), verbose=0) as writer:
        for number, pixels in enumerate(pictures):
            writer.write(
                {
                    "__key__": f"{number:06d}",
                    "jpg": pixels,
                    "cls": 0,
                    "txt": "an astronaut",
                    "json": _described(number),
                }
            )
    for file in folder.glob("*.tar"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def quality_of(pictures: Sequence[np.ndarray], folder: Path) -> float:
    """Peak signal-to-noise ratio in dB of a shard's images, over all pixels of these pictures."""
    import tarfile

    import numpy as np
    from PIL import Image

    (file,) = folder.glob("*.tar")
    with tarfile.open(file) as archive:
        total = 0.0
        for number, pixels in enumerate(pictures):
            member = archive.extractfile(f"{number:06d}.jpg")
            assert member is not None
            shown = np.asarray(Image.open(io.BytesIO(member.read())).convert("RGB")).astype(float)
            total += float(((shown - pixels) ** 2).mean())
    return float(10 * np.log10(255**2 * len(pictures) / total))


def _lowest(pictures: Sequence[np.ndarray], wanted: float) -> int:
    """The lowest quality of ours that reaches a signal-to-noise ratio on these pictures, or 100."""
    import numpy as np
    from PIL import Image

    from stages.images import encode

    for quality in range(50, 101):
        shown = [
            np.asarray(Image.open(io.BytesIO(encode(p, "jpeg", quality)))).astype(float) for p in pictures
        ]
        error = np.mean([((s - p) ** 2).mean() for s, p in zip(shown, pictures, strict=True)])
        if 10 * np.log10(255**2 / error) >= wanted:
            return quality
    return 100


def _parts(folder: Path, pictures: Sequence[np.ndarray]) -> tuple[Any, Any, Any]:
    """A store with the parts of a build of these pictures, its plan, and the tasks of packing it."""
    from pipeline.config import parse
    from pipeline.pack import plan_shards
    from pipeline.parts import described, part_name, to_parquet
    from pipeline.plan import make_plan
    from pipeline.references import Lock
    from pipeline.select import PASSED, Stream
    from pipeline.store import Store
    from schemas import tables
    from schemas.ids import sha256
    from stages.images import encode

    unit = 16
    count = len(pictures) // unit * unit or len(pictures)
    unit = min(unit, count)
    config = parse(
        {
            "output": str(folder),
            "recipes": {"benchmark": {"generate": {"method": "text_to_image"}, "unit": unit, "batch": 1}},
            "targets": [{"classes": ["astronaut"], "accepted": count, "attempts": 1}],
            "shard": {"samples": max(1, count // 4)},
        },
        "benchmark",
    )
    plan, store = make_plan(config, Lock()), Store(str(folder))
    (stream,) = plan.streams
    known = Stream(stream.quota, stream.max_units, stream.unit)
    for number in range(stream.max_units):
        rows = []
        for index in range(number * unit, (number + 1) * unit):
            image = encode(pictures[index], "jpeg", DEFAULT_QUALITY)
            row: dict[str, Any] = dict.fromkeys(tables.PART.names)
            row |= {
                "index": index, "key": stream.key(index), "status": "ok", "prompt": stream.prompt,
                "parents": [], "weights": [], "artifacts": [], "refine_losses": [], "generate_trace": [],
                "image_sha256": sha256(image), "width": pictures[index].shape[1],
                "height": pictures[index].shape[0], "image": image,
            }  # fmt: skip
            rows.append(row)
        part = to_parquet(rows, tables.PART, {**described(stream), "environment": {}})
        store.put_new(part_name(stream, number), part)
        known.learn(number, (PASSED,) * unit, "{}")
    return store, plan, list(plan_shards(plan, {stream.id: known.select()}))


def describe(facts: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        (
            name,
            str(facts["quality"][name]),
            timed(way),
            f"{way['samples_per_second']:.0f}",
            f"{way['bytes'] / 1e6:.1f}",
            f"{way['psnr']:.2f}",
            "" if name == THEIRS else f"{way['faster']:.2f} ×",
        )
        for name, way in facts["ways"].items()
    ]
    packing = facts["packing"]
    return "\n\n".join(
        [
            f"{facts['samples']} images of {facts['size']}² from arrays to a shard on the disk; medians of"
            f" {facts['runs']} runs (range).",
            table(
                ("way", "quality", "seconds", "samples/s", "MB", "PSNR, dB", "faster than webdataset"), rows
            ),
            f"Packing {packing['samples']} samples from parts: {timed(packing)} s,"
            f" {packing['megabytes_per_second']:.0f} MB/s.",
            footer(facts),
        ]
    )


if __name__ == "__main__":
    from jobs.entry import run

    run(shards)
