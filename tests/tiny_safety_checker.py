"""A safety checker of a few thousand weights, laid out as Stable Diffusion's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image


def save_safety_checker(folder: Path, photos: Sequence[Image.Image]) -> None:
    """Write checker and processor, untrained, with thresholds that some of the pictures pass."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=12)
    ).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    with torch.no_grad():
        pixels = processor(list(photos), return_tensors="pt").pixel_values
        pooled = checker.vision_model(pixels).pooler_output
        image_BE = torch.nn.functional.normalize(checker.visual_projection(pooled))
        for name, quantile in (("concept", 0.97), ("special_care", 0.9)):
            vectors = getattr(checker, f"{name}_embeds")
            vectors.copy_(image_BE.mean(dim=0) + 0.3 * torch.randn(vectors.shape))
            cosine = image_BE @ torch.nn.functional.normalize(vectors).T
            getattr(checker, f"{name}_embeds_weights").copy_(cosine.quantile(quantile, dim=0))
    checker.save_pretrained(folder / "safety_checker")
    processor.save_pretrained(folder / "feature_extractor")
    (folder / "model_index.json").write_text("{}")
