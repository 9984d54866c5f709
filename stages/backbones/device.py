"""Which device a worker computes on, in which precision, and kernels that give the same bits every time."""

from __future__ import annotations

import os
import warnings

import torch


def default_device() -> torch.device:
    """The CUDA device if there is one, else the CPU; no kernel is chosen by timing, and none uses TF32."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with this
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    # Attention's backward pass has a deterministic form that only this switch selects. It also fills every
    # new tensor with NaN unless told otherwise, and complains of kernels that have no such form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    return torch.device("cuda")


def precision_on(device: torch.device) -> torch.dtype:
    """What networks compute in unless told: half precision on GPUs, bfloat16 where they have it."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def tower_precision_on(device: torch.device) -> torch.dtype:
    """What the image towers of CLIP models compute in unless told: float16 on GPUs.

    They were trained for it, and a cosine needs digits more than range: the errors are a tenth of bfloat16's.
    """
    return torch.float16 if device.type == "cuda" else torch.float32
