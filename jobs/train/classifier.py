"""Train an image classifier on a build and evaluate it on real images: an example to copy and to change.

    python -m jobs.train.classifier my-dataset/out --val held-out --real 0.5
    torchrun --nproc-per-node 8 -m jobs.train.classifier my-dataset/out --val held-out --real 0.5

Any model of timm, AdamW with a cosine schedule, mixed precision on GPUs, a process for each of them. The
losses for long tails add the logarithm of the class's share of the training images to its logit: Balanced
Softmax (Ren et al., NeurIPS 2020, Eq. 3), and tau times as much (Menon et al., ICLR 2021, Eq. 10), which is
the same at 1.

It leaves OUT/checkpoint.pt after every epoch and OUT/metrics.json at the end; the same command goes on from
the checkpoint that it finds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from jobs.options import BuildId, Uri
from jobs.train.dataset import Share, open_dataset
from jobs.train.ranks import rank_and_world
from schemas.errors import UserError
from schemas.ids import random_stream

LOSSES = ("cross-entropy", "balanced-softmax", "logit-adjusted")
WARM_UP = 0.05  # of the steps


def classifier(
    uri: Uri,
    val: Annotated[Path, typer.Option(help="Held-out images: a folder with a subfolder for each class.")],
    build: BuildId = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint.pt and metrics.json.")] = Path("out/train"),
    real: Annotated[
        str, typer.Option(help="Share of real images in a class, or 'once' for each once.")
    ] = "0",
    references: Annotated[
        str | None, typer.Option(help="Real images; unless given, the build's own.")
    ] = None,
    model: Annotated[str, typer.Option(help="A model of timm.")] = "resnet18",
    pretrained: Annotated[bool, typer.Option(help="Start from the weights that timm has for it.")] = False,
    loss: Annotated[str, typer.Option(help=f"One of {', '.join(LOSSES)}.")] = "cross-entropy",
    tau: Annotated[float, typer.Option(min=0, help="Strength of logit-adjusted.")] = 1.0,
    epochs: Annotated[int, typer.Option(min=1)] = 90,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step, of each process.")] = 64,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels.")] = 224,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images, for each process.")] = 4,
    rng_seed: int = 0,
) -> None:
    """Train a classifier on a build."""
    if loss not in LOSSES:
        raise UserError(f"--loss {loss!r}: allowed are {', '.join(LOSSES)}")
    rank, world_size = rank_and_world()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    augment = v2.Compose(
        [v2.RandomResizedCrop(image_size, (0.5, 1.0)), v2.RandomHorizontalFlip(), *to_tensor]
    )
    plain = v2.Compose([v2.Resize((image_size, image_size)), *to_tensor])
    dataset = open_dataset(
        uri, build=build, real=_share(real), references=references, transform=augment, rng_seed=rng_seed
    )
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    loader = dataset.loader(batch_size, last="drop", **options)  # batch norm needs more than one
    held_out = _held_out(val, dataset.classes, plain)
    own: DataLoader = DataLoader(
        Subset(held_out, range(rank, len(held_out), world_size)), batch_size, **options
    )

    torch.manual_seed(rng_seed)  # the same weights everywhere, but not the same augmentations
    network = timm.create_model(model, pretrained=pretrained, num_classes=len(dataset.classes)).to(device)
    torch.manual_seed(int(random_stream("augment", rng_seed, rank).integers(2**31)))
    trained: nn.Module = DistributedDataParallel(network) if world_size > 1 else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    half = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and half == torch.float16)
    strength = {"cross-entropy": 0.0, "balanced-softmax": 1.0, "logit-adjusted": tau}[loss]
    shift_C = strength * log_prior(dataset.images_per_epoch.values()).to(device)

    kept: tuple[Any, ...] = (network, optimizer, schedule, scaler, loader)
    checkpoint = out / "checkpoint.pt"
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for part, content in zip(kept, state["kept"], strict=True):
            part.load_state_dict(content)
        history = state["history"]
    while len(history) < epochs:
        trained.train()
        total = torch.zeros(2, device=device)
        for batch in loader:
            images, labels = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
            with torch.autocast(device.type, half, enabled=device.type == "cuda"):
                logits = trained(images)
            value = F.cross_entropy(logits.float() + shift_C, labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            total += torch.stack([value.detach() * len(labels), torch.tensor(len(labels), device=device)])
        value_all, count = _sum(total).tolist()
        history.append({"loss": value_all / count, **evaluate(network, own, dataset.classes, device)})
        if rank == 0:
            print(f"epoch {len(history)}/{epochs}: loss {value_all / count:.4f},", end=" ")
            print(f"accuracy {history[-1]['accuracy']:.4f}", flush=True)
            out.mkdir(parents=True, exist_ok=True)
            state = {"kept": [part.state_dict() for part in kept], "history": history}
            torch.save(state, out / "checkpoint.part")
            os.replace(out / "checkpoint.part", checkpoint)
    if rank == 0:
        about: dict[str, Any] = {"build": dataset.manifest.build_id, "model": model, "loss_function": loss}
        about["images_per_epoch"] = dataset.images_per_epoch
        (out / "metrics.json").write_text(json.dumps({**history[-1], **about, "history": history}, indent=2))
    if world_size > 1:
        dist.destroy_process_group()


def log_prior(counts: Iterable[int]) -> Tensor:
    """Logarithm of each class's share of the images, (C); a class without any counts as if it had one."""
    share_C = torch.tensor(list(counts), dtype=torch.float32).clamp(min=1)
    return (share_C / share_C.sum()).log()


@torch.no_grad()
def evaluate(
    network: nn.Module, images: DataLoader, classes: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Accuracy over all images, its mean over classes, and that of each class that has any."""
    network.eval()
    counts_2C = torch.zeros(2, len(classes), device=device)
    for image_B3hw, label_B in images:
        right_B = network(image_B3hw.to(device)).argmax(1).cpu() == label_B
        for row, labels in enumerate((label_B[right_B], label_B)):
            counts_2C[row] += torch.bincount(labels, minlength=len(classes)).to(device)
    right_C, all_C = _sum(counts_2C).tolist()
    per_class = {name: r / n for name, r, n in zip(classes, right_C, all_C, strict=True) if n}
    return {
        "accuracy": sum(right_C) / sum(all_C),
        "mean_class_accuracy": sum(per_class.values()) / len(per_class),
        "class_accuracy": per_class,
    }


def _sum(values: Tensor) -> Tensor:
    """Over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warm_up = max(1, int(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _share(text: str) -> Share:
    try:
        return "once" if text == "once" else float(text)
    except ValueError:
        raise UserError(f"--real {text!r}: give a share from 0 to 1, or 'once'") from None


def _held_out(folder: Path, classes: tuple[str, ...], transform: Any) -> ImageFolder:
    """The folder with the class indices of the training. Raises `UserError`."""
    try:
        found = ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise UserError(f"--val {folder}: {error}; give a folder with a subfolder for each class") from None
    if unknown := sorted(set(found.classes) - set(classes)):
        raise UserError(f"--val {folder}: the class {unknown[0]!r} is none of {', '.join(classes)}")
    found.target_transform = [classes.index(name) for name in found.classes].__getitem__
    return found


if __name__ == "__main__":
    from jobs.entry import run

    run(classifier)
