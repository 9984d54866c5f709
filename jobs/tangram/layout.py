"""From checkpoints to the folder that is shipped: diffusers' layout, fp16 safetensors, SHA256SUMS.

unet, vae, text_encoder, tokenizer, scheduler and model_index.json are what Stable Diffusion has; clip is
open_clip's local folder; classifier and judge are a timm name with its arguments beside the weights.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from jobs.tangram.classifiers import PLANS, new_classifier
from jobs.tangram.clip import model_config, new_clip
from jobs.tangram.data import long_tail
from jobs.tangram.diffusion import Painter, new_scheduler
from jobs.tangram.drawings import CLASSES, SIZE
from jobs.tangram.training import averaged
from jobs.tangram.vae import new_vae, standardised
from jobs.tangram.words import new_tokenizer
from stages.backbones.weights import SUMS, sha256_of

MEAN = STD = [0.5, 0.5, 0.5]  # pixels 0..1 to -1..1, for every network here


def checkpoint_of(out: Path, part: str) -> Path:
    """Where a part's training keeps its state."""
    return out / "checkpoints" / f"{part}.pt"


def finished_vae(out: Path) -> AutoencoderKL:
    """The trained autoencoder with standardised latents; untrained where there is no checkpoint."""
    vae = new_vae()
    checkpoint = checkpoint_of(out, "vae")
    if checkpoint.exists():
        vae.load_state_dict(averaged(checkpoint))
        pixels = long_tail().pixels
        # The first pictures alone would be circles; a stride takes every class at its share.
        vae = standardised(vae, pixels[:: len(pixels) // 2000])
    return vae.eval()


def export(out: Path, folder: Path) -> None:
    """Write the layout of all checkpoints under `out` to `folder` (parts without one stay untrained)."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    _save_diffusers(out, fresh)
    _save_clip(_trained(new_clip(), out, "clip"), fresh / "clip")
    for name, plan in PLANS.items():
        config = {
            "architecture": plan.architecture,
            "args": plan.args,
            "classes": list(CLASSES),
            "image_size": SIZE,
            "mean": MEAN,
            "std": STD,
        }
        _save_classifier(_trained(new_classifier(name), out, name), config, fresh / name)
    replace_files(fresh, folder)


def replace_files(fresh: Path, folder: Path) -> None:
    """Move every file of `fresh` over its namesake in `folder`, then write the sums."""
    for path in sorted(fresh.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(fresh)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)  # safetensors writes for the owner alone; a wheel would keep that
            os.replace(path, target)
    shutil.rmtree(fresh)
    write_sums(folder)


def write_sums(folder: Path) -> None:
    """SHA256SUMS over every file that a loader reads, in sha256sum's own format."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in {".json", ".safetensors", ".txt"})
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    aside = folder / f"{SUMS}.tmp"
    aside.write_text("".join(lines))
    os.replace(aside, folder / SUMS)


def _trained(model: nn.Module, out: Path, part: str) -> nn.Module:
    checkpoint = checkpoint_of(out, part)
    if checkpoint.exists():
        model.load_state_dict(averaged(checkpoint))
    return model.eval()


def _save_diffusers(out: Path, folder: Path) -> None:
    painter = _trained(Painter(), out, "diffusion")
    assert isinstance(painter, Painter)
    for name, model in (
        ("vae", finished_vae(out)),
        ("unet", painter.unet),
        ("text_encoder", painter.text_encoder),
    ):
        copy.deepcopy(model).half().save_pretrained(folder / name, safe_serialization=True)
    save_tokenizer(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def save_tokenizer(folder: Path) -> None:
    """The tokenizer in both of its file forms, so that older and newer transformers read it."""
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _save_clip(clip: nn.Module, folder: Path) -> None:
    save_tokenizer(folder)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    _write_json(folder / "open_clip_config.json", {"model_cfg": model_config(), "preprocess_cfg": preprocess})
    save_file(half_state(clip), folder / "open_clip_model.safetensors")


def _save_classifier(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    save_file(half_state(model), folder / "model.safetensors")


def half_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a safetensors file: floats as fp16, integers as they are."""
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
