"""What kinds of diffusion model there are, and what each can do: the one table of it.

Config validation, the loader and the README's table read it. The kind of a folder is told by its component
configs, which are small and need no weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from stages.contract import Need
from stages.schedule import Diffusion, Flow, SchedulerName


@dataclass(frozen=True)
class Architecture:
    """A kind of diffusion model in the diffusers folder layout."""

    name: str
    models: str  # examples, for people
    denoiser: str  # the folder of the network that is asked in every step
    vae: str  # the folder of the autoencoder
    encoders: tuple[tuple[str, str], ...]  # folders of each text encoder and its tokenizer
    provides: frozenset[Need]
    schedulers: tuple[SchedulerName, ...]
    optional: frozenset[str] = frozenset()  # folders that a checkpoint may lack

    @property
    def weighted(self) -> tuple[str, ...]:
        """The folders with weights."""
        return (self.denoiser, self.vae, *(encoder for encoder, _ in self.encoders))

    @property
    def components(self) -> tuple[str, ...]:
        """All folders that are read."""
        return ("scheduler", *self.weighted, *(tokenizer for _, tokenizer in self.encoders))

    @property
    def configs(self) -> tuple[str, ...]:
        """Files that every folder of this kind has."""
        needed = (part for part in self.weighted if part not in self.optional)
        return ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in needed))

    @property
    def prompted(self) -> bool:
        return "prompt" in self.provides

    def refuses(self, needs: frozenset[Need]) -> str | None:
        """What a method with these needs misses, in words; None where it can run."""
        missing = needs - self.provides
        return f"{WORDS[min(missing)]}, and {self.name} is none" if missing else None


WORDS: Mapping[Need, str] = {
    "diffusion": "a backbone that predicts ε or v",
    "flow": "a flow-matching backbone",
    "prompt": "a backbone that reads prompts",
    "words": "a backbone for which words can be learned",
}
READS: frozenset[Need] = frozenset({"prompt", "words"})
ENCODERS = (
    ("text_encoder", "tokenizer"),
    ("text_encoder_2", "tokenizer_2"),
    ("text_encoder_3", "tokenizer_3"),
)

ARCHITECTURES = (
    Architecture(
        "sd",
        "tangram, Stable Diffusion 1.x and 2.x (ε and v), SD-Turbo",
        denoiser="unet",
        vae="vae",
        encoders=ENCODERS[:1],
        provides=READS | {"diffusion"},
        schedulers=Diffusion.schedulers,
    ),
    Architecture(
        "sdxl",
        "SDXL, SDXL-Lightning, SDXL-Turbo",
        denoiser="unet",
        vae="vae",
        encoders=ENCODERS[:2],
        provides=READS | {"diffusion"},
        schedulers=Diffusion.schedulers,
    ),
    Architecture(
        "sd3",
        "Stable Diffusion 3 and 3.5, with or without T5",
        denoiser="transformer",
        vae="vae",
        encoders=ENCODERS,
        provides=READS | {"flow"},
        schedulers=Flow.schedulers,
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    ),
    Architecture(
        "ldm",
        "unconditional latent diffusion with a VQ model, as LDM-CelebA-HQ and LDM-FFHQ",
        denoiser="unet",
        vae="vqvae",
        encoders=(),
        provides=frozenset({"diffusion"}),
        schedulers=Diffusion.schedulers,
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def architecture_of(folder: Path, what: str) -> Architecture:
    """The kind of model that lies in a folder. Raises `UserError` for a folder of none of them."""
    if not folder.is_dir():
        raise UserError(f"{what}: there is no folder {folder}")
    if (folder / "transformer" / "config.json").is_file():
        kind = config_of(folder, "transformer").get("_class_name")
        if kind == "SD3Transformer2DModel":
            return BY_NAME["sd3"]
        raise UserError(f"{what}: its transformer is a {kind}; supported are {_supported()}")
    if (folder / "vqvae" / "config.json").is_file():
        return BY_NAME["ldm"]
    if not (folder / "unet" / "config.json").is_file():
        raise UserError(
            f"{what}: {folder} lacks unet/config.json (or transformer/config.json): it is no whole"
            " model in the diffusers layout; give the folder that holds model_index.json, and set"
            " `subfolder` if it lies deeper"
        )
    added = config_of(folder, "unet").get("addition_embed_type")
    if added not in (None, "text_time"):
        raise UserError(
            f"{what}: its UNet has added conditions of kind {added}; supported are {_supported()}"
        )
    return BY_NAME["sd" if added is None else "sdxl"]


def config_of(folder: Path, component: str) -> dict[str, Any]:
    """The config file of a component."""
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folder / component / name
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is no JSON ({error}): the model is damaged; copy or download it again"
        ) from error


def sizes(folder: Path, architecture: Architecture) -> tuple[tuple[int, int, int], int]:
    """Shape (C, H, W) of a latent and side of an image in pixels at the native size, from config files."""
    denoiser, vae = config_of(folder, architecture.denoiser), config_of(folder, architecture.vae)
    side = denoiser["sample_size"]
    return (denoiser["in_channels"], side, side), side * 2 ** (len(vae["block_out_channels"]) - 1)


def table() -> str:
    """The capabilities as a table in Markdown."""
    head = ("backbone", "examples", "prompt", "predicts", "text encoders", "schedulers")
    rows = [head, ("---",) * len(head)]
    for a in ARCHITECTURES:
        predicts = "flow" if "flow" in a.provides else "ε or v"
        rows.append(
            (
                a.name,
                a.models,
                "yes" if a.prompted else "no",
                predicts,
                str(len(a.encoders)),
                ", ".join(f"`{name}`" for name in a.schedulers),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _supported() -> str:
    return "; ".join(a.models for a in ARCHITECTURES)
