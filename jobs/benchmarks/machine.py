"""What a figure was measured on: it means nothing without."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path


def hardware() -> str:
    """Cores and processor, and the GPUs."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return ", ".join([f"{os.cpu_count()} × {model}", *names])


def versions(*libraries: str) -> dict[str, str]:
    """Of Python, of this package, and of the libraries that the figure depends on."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("seedloom", *libraries)}}
