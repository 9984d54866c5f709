"""The safety checker that comes with Stable Diffusion checkpoints: a CLIP vision network and 17 concepts.

Rombach et al., arXiv:2112.10752, as released; what it computes: Rando et al., arXiv:2210.04610, section 3. It
lies beside the model as `safety_checker/` and `feature_extractor/`, or alone, with preprocessor_config.json
(CompVis/stable-diffusion-safety-checker). The checkpoint has the concepts as vectors only.

Departures from diffusers' StableDiffusionSafetyChecker: images are resized as tensors, without rounding to
8 bits, so margins differ by about 1e-3 where an image is not of the network's own size; nothing is blackened.

Shape letters: B batch, h w image, E features, K concepts, S special-care concepts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files, hub
from stages.backbones.pretrained import load_pretrained, preprocessing_of
from stages.backbones.resize import Preprocessing

CARE = 0.01  # how much nearer everything counts where a special-care concept is met
CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
BESIDE = ("safety_checker", "feature_extractor")  # where checker and processor lie in a checkpoint


def margin_to_concepts(
    image_BE: Float[Tensor, "B E"],
    concept_KE: Float[Tensor, "K E"],
    threshold_K: Float[Tensor, " K"],
    care_SE: Float[Tensor, "S E"],
    care_threshold_S: Float[Tensor, " S"],
) -> Float[Tensor, " B"]:
    """max over concepts of cos − threshold, and `CARE` more where a special-care concept is met; in float64.

    Rounded to three digits, as diffusers does before it compares with 0.
    """

    def over(vector_KE: Tensor, threshold_K: Tensor) -> Tensor:
        cosine_BK = F.normalize(image_BE.double()) @ F.normalize(vector_KE.double()).T
        return cosine_BK - threshold_K.double()

    met_B = (over(care_SE, care_threshold_S).round(decimals=3) > 0).any(dim=1)
    return (over(concept_KE, threshold_K).amax(dim=1) + CARE * met_B).round(decimals=3)


class ConceptChecker:
    """Looks at image tensors as they are: in [-1, 1], of any size."""

    def __init__(self, model: Any, prepare: Preprocessing, fingerprint: str):
        self._model, self._prepare = model, prepare
        self.fingerprint = fingerprint

    def margin(self, image_B3hw: Float[Tensor, "B 3 h w"]) -> Float[Tensor, " B"]:
        model = self._model
        with torch.no_grad():
            pooled_BD = model.vision_model(self._prepare(image_B3hw)).pooler_output
            return margin_to_concepts(
                model.visual_projection(pooled_BD),
                model.concept_embeds,
                model.concept_embeds_weights,
                model.special_care_embeds,
                model.special_care_embeds_weights,
            )


def load_safety_checker(model: str, device: torch.device) -> ConceptChecker:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    what, identity = f"safety_checker {model}", safety_checker_fingerprint(model)
    config, weights, processor = _files(model)
    variant = weights.name.removeprefix("model.").removesuffix("safetensors").removesuffix(".") or None
    with files.told(what, config.parent):
        network = load_pretrained(StableDiffusionSafetyChecker, config.parent, what, variant=variant)
        wanted = CLIPImageProcessor.from_pretrained(processor.parent, local_files_only=True)
        prepare = preprocessing_of(wanted, what, device)
    return ConceptChecker(network.to(device).eval().requires_grad_(False), prepare, identity)


def safety_checker_fingerprint(model: str) -> str:
    """`load_safety_checker(model, …).fingerprint`, from the bytes of the files alone."""
    config, weights, processor = _files(model)
    folder = config.parent
    return fingerprint(
        {
            "files": files.hashes(folder, [config, weights]),
            "processor": files.hashes(processor.parent, [processor]),
        }
    )


def _files(model: str) -> tuple[Path, Path, Path]:
    """config.json, the weights and preprocessor_config.json on this machine, downloaded if need be."""
    what = f"safety_checker {model}"
    local = hub.local_folder(
        model,
        what,
        f"give a folder in the diffusers layout that has {' and '.join(BESIDE)}, or a hub id such as"
        " CompVis/stable-diffusion-safety-checker",
    )
    if local is not None:
        folder = local
    else:
        names = (CONFIG, f"{BESIDE[0]}/{CONFIG}", PROCESSOR, f"{BESIDE[1]}/{PROCESSOR}")
        folder = hub.fetch(model.removeprefix(hub.PREFIX), names, what)
    checker, processor = (folder / name if (folder / name).is_dir() else folder for name in BESIDE)
    if not (checker / CONFIG).is_file():
        raise UserError(
            f"{what} has no safety checker: neither {BESIDE[0]}/ nor the {CONFIG} of one alone; name one that"
            " has, such as CompVis/stable-diffusion-safety-checker"
        )
    files.need(processor, [PROCESSOR], what)
    if local is None:
        inside = "" if checker == folder else f"{BESIDE[0]}/"
        hub.fetch_weights(model.removeprefix(hub.PREFIX), folder, f"{inside}{WEIGHTS}", what)
    variants = sorted(checker.glob("model.*.safetensors"))  # such as model.fp16.safetensors
    weights = checker / WEIGHTS
    if not weights.is_file() and variants:
        weights = variants[0]
    files.need(checker, [weights.name], what)
    return checker / CONFIG, weights, processor / PROCESSOR
