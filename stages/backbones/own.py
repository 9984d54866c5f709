"""A user's own model by its import path, package.module:Class.

The class (any callable) is called without arguments, in each process that uses it. A torch.nn.Module is moved
to the device and trained no more; anything else is left as it is. It must be the same model each time. Nobody
can tell from outside when its weights change: its identity is its import path and, where it has one, its
attribute `fingerprint` (a string), which should change with them.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

from schemas.errors import UserError
from schemas.ids import fingerprint
from stages.backbones import files


def is_import_path(model: str) -> bool:
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", model) is not None


def make(path: str, what: str, allowed: str) -> Any:
    """The model, on the CPU. `what` opens the line that says what is wrong, `allowed` ends it."""
    name, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"{what} cannot be imported ({files.first_line(error)}); {allowed}") from error
    try:
        with torch.inference_mode(False):
            return factory()
    except Exception as error:  # a user's own code
        raise UserError(
            f"{what} cannot be made ({type(error).__name__}: {files.first_line(error)});"
            " it is called without arguments"
        ) from error


def identity(path: str, made: Any, what: str) -> str:
    said = getattr(made, "fingerprint", None)
    if not isinstance(said, str | None):
        raise UserError(f"{what}: its fingerprint is a {type(said).__name__}; it must be a string")
    return fingerprint({"module": path, "fingerprint": said})


def need(made: Any, methods: tuple[str, ...], attributes: tuple[str, ...], what: str) -> None:
    """Raise `UserError` for what the model does not offer."""
    missing = [f"{name}()" for name in methods if not callable(getattr(made, name, None))]
    missing += [name for name in attributes if not hasattr(made, name)]
    if missing:
        raise UserError(
            f"{what} gives a {type(made).__name__} without {', '.join(missing)};"
            f" it must offer {', '.join([*(f'{name}()' for name in methods), *attributes])}"
        )


def on_device(made: Any, device: torch.device) -> Any:
    if isinstance(made, torch.nn.Module):
        return made.to(device).eval().requires_grad_(False)
    return made


def rows(found: Any, count: int, what: str, of: str, given: str, width: int | None = None) -> Tensor:
    """What a model gave, if it is a row of numbers for each of `count` things given; else a `UserError`."""
    if not isinstance(found, Tensor):
        is_ = f"a {type(found).__name__}"
    elif (
        found.ndim != 2
        or len(found) != count
        or width not in (None, found.shape[1])
        or not found.is_floating_point()
    ):
        is_ = f"{found.dtype} of shape {tuple(found.shape)}".removeprefix("torch.")
    else:
        return found
    raise UserError(
        f"{what}: gives {is_} for {count} {given}; it must give a row of {of} for each, floating-point"
        f" numbers of shape ({given}, {width or of})"
    )
