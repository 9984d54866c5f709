"""Where the files of a backbone lie, whether they are whole, and what identifies them.

A hub id is downloaded once for each node: the workers of a node share the hub's cache, whose locks let one of
them download while the others wait. Weights are mapped into memory from there, so what they read is shared.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files, hub
from stages.backbones.diffusion.architectures import Architecture, architecture_of
from stages.backbones.diffusion.settings import BackboneSettings

ALL_COMPONENTS = (
    "scheduler",
    "unet",
    "transformer",
    "vae",
    "vqvae",
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)
DECODER = ("config.json", "diffusion_pytorch_model.safetensors")
READ = (".json", ".txt", ".model")  # suffixes of what is read beside weights


def folder_of(settings: BackboneSettings) -> Path:
    """Where the model lies on this machine; a hub id is downloaded if it is not in the cache yet.

    Raises `UserError` unless it holds a model of a known kind with all files of the variant.
    """
    what = f"backbone {settings.model}"
    if settings.model == "tangram":
        folder: Path | None = files.tangram()
    else:
        allowed = "give tangram, a local folder, or a hub id such as owner/name"
        folder = hub.local_folder(settings.model, what, allowed)
    if settings.revision is not None and folder is not None:
        raise UserError(f"{what}: revision {settings.revision} given, but only a hub id has revisions")
    if folder is None:
        folder = _download(settings.model, settings.revision, settings.variant, settings.subfolder or "")
    folder = folder / (settings.subfolder or "")
    architecture = architecture_of(folder, what)
    files.need(folder, architecture.configs, what)
    for component in architecture.weighted:
        if (folder / component).is_dir() or component not in architecture.optional:
            _check_weights(folder / component, settings, what)
    return folder


def _check_weights(component: Path, settings: BackboneSettings, what: str) -> None:
    """Raise `UserError` when a component's weights are absent, only pickled, or not all there."""
    found = [file for file in component.iterdir() if is_weights(file, settings.variant)]
    if not found:
        wanted = f"*.{settings.variant}.safetensors" if settings.variant else "*.safetensors"
        others = sorted({variant_of(f) for f in component.glob("*.safetensors")} - {settings.variant or ""})
        hint = ""
        if others:
            variants = ", ".join(name or "none" for name in others)
            hint = f"; it has the variant {variants}: set `variant`, or leave it out"
        elif pickled := [file.name for file in component.iterdir() if file.suffix in files.PICKLES]:
            hint = files.only_pickled(pickled)
        elif any(component.glob("*.incomplete")):
            hint = "; its download was cut off: download it again"
        raise UserError(f"{what}: {component} has no {wanted}{hint}")
    for index in component.glob("*.safetensors.index*.json"):
        named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        if any(name in {file.name for file in found} for name in named):
            missing = sorted(name for name in named if not (component / name).is_file())
            if missing:
                raise UserError(
                    f"{what}: {component} lacks {', '.join(missing)}, which {index.name} names: copy or"
                    " download the rest"
                )


def is_weights(file: Path, variant: str | None) -> bool:
    """Whether a weight file belongs to the variant: model.fp16.safetensors, model.fp16-00001-of-00002.…"""
    return file.suffix == ".safetensors" and variant_of(file) == (variant or "")


def variant_of(file: Path) -> str:
    """fp16 of model.fp16.safetensors and of model.fp16-00001-of-00002.safetensors, else ""."""
    infix = file.stem.partition(".")[2]
    return infix.partition("-")[0]


def backbone_fingerprint(settings: BackboneSettings) -> str:
    """`load_backbone(settings).fingerprint`, from the bytes of the files alone."""
    folder = folder_of(settings)
    architecture = architecture_of(folder, f"backbone {settings.model}")
    used = files_used(folder, architecture, settings.variant)
    identity: dict[str, Any] = {
        "files": files.hashes(folder, used),
        "dtype": settings.dtype,
        "compile": settings.compile,
    }
    if settings.unet is not None:
        identity["unet"] = list(files.hashes(unet_file(settings).parent, [unet_file(settings)]).values())
    if settings.decoder is not None:
        small = decoder_folder(settings)
        identity["decoder"] = files.hashes(small, [small / name for name in DECODER])
    return fingerprint(identity)


def files_used(folder: Path, architecture: Architecture, variant: str | None) -> list[Path]:
    """Every file that a model of this kind is made from."""
    used = [
        file
        for component in architecture.components
        if (folder / component).is_dir()
        for file in (folder / component).iterdir()
        if file.suffix in READ or is_weights(file, variant)
    ]
    index = folder / "model_index.json"  # what it says of empty prompts is read, for SDXL
    return [*used, index] if architecture.name == "sdxl" and index.is_file() else used


def unet_file(settings: BackboneSettings) -> Path:
    """The file of `settings.unet`, downloaded if it is one on the hub."""
    assert settings.unet is not None
    local, what = Path(settings.unet).expanduser(), f"backbone {settings.model}: unet {settings.unet}"
    if local.suffix != ".safetensors":
        raise UserError(f"{what}: give a .safetensors file, or one on the hub as OWNER/NAME/FILE.safetensors")
    if local.is_file():
        return local.resolve()
    owner, _, rest = settings.unet.partition("/")
    name, _, file = rest.partition("/")
    if local.is_absolute() or owner[:1] in ("", ".", "~") or not file:
        raise UserError(f"{what}: no such file; give one, or one on the hub as OWNER/NAME/FILE.safetensors")
    return hub.fetch(f"{owner}/{name}", (file,), what) / file


def decoder_folder(settings: BackboneSettings) -> Path:
    """The folder of `settings.decoder`, downloaded if it is a hub id."""
    assert settings.decoder is not None
    what = f"backbone {settings.model}: decoder {settings.decoder}"
    folder = hub.local_folder(
        settings.decoder, what, "give a folder of an AutoencoderTiny, or a hub id such as madebyollin/taesd"
    )
    if folder is None:
        folder = hub.fetch(settings.decoder, DECODER, what)
    files.need(folder, DECODER, what)
    return folder


@lru_cache
def _download(model: str, revision: str | None, variant: str | None, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download

    infix, inside = f".{variant}*" if variant else "", f"{subfolder}/" if subfolder else ""
    names = ("*.json", "*.txt", "*.model", f"*{infix}.safetensors")
    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[
                f"{inside}model_index.json",
                *(f"{inside}{component}/{name}" for component in ALL_COMPONENTS for name in names),
            ],
            ignore_patterns=None if variant else ["*.*.safetensors"],
        )
    except Exception as error:  # the hub client raises its own, httpx's and the system's
        raise UserError(
            f"backbone {model} is neither a local folder nor to be had from the Hugging Face hub "
            f"(revision {revision or 'default'}): {files.first_line(error)};"
            " without network, give a local folder"
        ) from error
    return Path(folder)
