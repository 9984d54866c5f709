"""Networks in the folder layout of transformers, how they want pixels, and weights that processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from schemas.errors import UserError
from stages.backbones.resize import Preprocessing


def load_pretrained(cls: Any, folder: Path, what: str, **options: Any) -> Any:
    """A transformers model in float32, every weight of it from the folder; no code there is ever run.

    transformers maps weights into memory by itself. It draws at random what a file lacks, with a warning;
    here that is a `UserError`. What a library raises stays as it is.
    """
    import transformers

    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the report of missing weights
    try:
        with torch.inference_mode(False):
            model, report = cls.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, local_files_only=True,
                output_loading_info=True, **options,
            )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{what}: {folder} has no weights for {missing[0]}{' and others' if missing[1:] else ''};"
            f" it holds another kind of model than {type(model).__name__}"
        )
    return model


def preprocessing_of(processor: Any, what: str, device: torch.device) -> Preprocessing:
    """How a transformers image processor normalises pixels, as found from what it makes of black and white.

    Its size is taken over, its way of resizing and its cropping are not: see `Preprocessing`.
    """
    black_3SS, white_3SS = (
        processor(images=[Image.new("RGB", (64, 64), colour)], return_tensors="pt").pixel_values[0]
        for colour in ("black", "white")
    )
    channels, height, width = black_3SS.shape
    if channels != 3 or height != width:
        raise UserError(f"{what}: wants images of shape {(channels, height, width)}; only squares are made")
    black_3, white_3 = black_3SS[:, 0, 0].double(), white_3SS[:, 0, 0].double()
    std_3 = 1 / (white_3 - black_3)
    return Preprocessing(height, (-black_3 * std_3).tolist(), std_3.tolist(), device)


def map_weights(network: torch.nn.Module, file: Path) -> None:
    """Let a network on the CPU use the very pages of its file where the file has the same numbers.

    open_clip and timm map the file, but copy it into memory of each process; so the processes of a node
    share one copy, which the system may also drop and read again.
    """
    with torch.inference_mode(False), torch.no_grad():
        mapped = load_file(file)
        for name, own in network.state_dict(keep_vars=True).items():
            there = mapped.get(name)
            if there is not None and there.dtype == own.dtype and torch.equal(there, own):
                own.data = there
