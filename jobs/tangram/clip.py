"""The CLIP model: a small open_clip network on balanced drawings. It stands for a foundation model.

Loss: CLIP's symmetric contrastive loss, in which equal captions count as equal answers, plus the
cross-entropy over "a photo of a {class}" for all classes, which is how it will be asked.
Shape letters: B batch, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from jobs.tangram.data import balanced, epoch_batch, to_model
from jobs.tangram.degrade import degrade, mixed_up
from jobs.tangram.diffusion import tokenised
from jobs.tangram.drawings import CLASSES, caption
from jobs.tangram.training import Schedule, fit
from jobs.tangram.words import LENGTH, new_tokenizer

SCHEDULE = Schedule(steps=2600, learning_rate=1.5e-3, average=0.995)
BATCH = 64
PER_CLASS = 1200  # drawings
RNG_SEED = 33
CLASS_PROMPTS = [f"a photo of a {name.replace('_', ' ')}" for name in CLASSES]


def model_config() -> dict[str, Any]:
    """open_clip's description of the two towers."""
    tokenizer = new_tokenizer()
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg"},
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tangram",  # only its presence counts: the files lie beside
            "width": 128,
            "heads": 4,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


def new_clip() -> open_clip.CLIP:
    """The untrained model."""
    torch.manual_seed(RNG_SEED)
    return open_clip.CLIP(**model_config())


def train_clip(checkpoint: Path, *, steps: int | None = None, resume: bool = True) -> dict[str, float]:
    """Train; the averaged weights end up in `checkpoint`."""
    data = balanced("foundation", PER_CLASS, RNG_SEED)
    model, tokenizer = new_clip(), new_tokenizer()
    prompts_KL = tokenised(tokenizer, CLASS_PROMPTS)
    target_NK = F.one_hot(data.labels, len(CLASSES)).float()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = epoch_batch(len(data.pixels), BATCH, step, "clip", RNG_SEED)
        wording = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        texts = [caption(data.attributes[row], wording) for row in rows.tolist()]
        same_BB = torch.tensor([[a == b for b in texts] for a in texts]).float()
        pair_BB = same_BB / same_BB.sum(1, keepdim=True)
        x = degrade(to_model(data.pixels[rows]), generator)
        x, targets = mixed_up(x, torch.cat([target_NK[rows], pair_BB], 1), generator)
        with torch.autocast("cpu", torch.bfloat16):
            image_BD = model.encode_image(x, normalize=True).float()
            text_D = model.encode_text(
                torch.cat([prompts_KL, tokenised(tokenizer, texts)]), normalize=True
            ).float()
        logits = model.logit_scale.exp().clamp(max=100) * image_BD @ text_D.T
        to_class, to_text = logits[:, : len(CLASSES)], logits[:, len(CLASSES) :]
        images_BB = targets[:, len(CLASSES) :]
        of_text_BB = images_BB.T / images_BB.sum(0)[:, None].clamp(min=1e-6)
        contrast = (F.cross_entropy(to_text, images_BB) + F.cross_entropy(to_text.T, of_text_BB)) / 2
        return contrast + F.cross_entropy(to_class, targets[:, : len(CLASSES)])

    return fit("clip", model, loss_at, SCHEDULE.lasting(steps), checkpoint, rng_seed=RNG_SEED, resume=resume)
