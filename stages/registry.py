"""Methods by name. A method file registers itself; a user's own class works by import path.

The config file, the JSON schema and the docs all read this table, so adding a method is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from schemas.errors import UserError
from stages import contract

KINDS: dict[str, type[contract.Method]] = {
    "read": contract.Read,
    "invert": contract.Invert,
    "combine": contract.Combine,
    "refine": contract.Refine,
    "generate": contract.Generate,
    "filter": contract.Filter,
    "measure": contract.Measure,
}

_methods: dict[tuple[str, str], type[contract.Method]] = {}
M = TypeVar("M", bound=type[contract.Method])


def method(name: str) -> Callable[[M], M]:
    """Class decorator: register a method of the kind it derives from, under the name that configs use."""

    def register(cls: M) -> M:
        cls.name = name
        _methods[cls.kind, name] = cls
        return cls

    return register


@cache
def _load(kind: str) -> None:
    package = importlib.import_module(f"stages.{kind}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def names(kind: str) -> list[str]:
    """The built-in methods of a kind, sorted."""
    _load(kind)
    return sorted(name for k, name in _methods if k == kind)


def resolve(kind: str, name: str) -> type[contract.Method]:
    """The class of a method by its name, or by the import path `package.module:Class` of a user's own."""
    _load(kind)
    if (kind, name) in _methods:
        return _methods[kind, name]
    allowed = f"allowed: {', '.join(names(kind))}, or package.module:Class"
    if ":" not in name:
        raise UserError(f"unknown {kind} method {name!r}; {allowed}")
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"{kind} method {name!r} cannot be imported ({error}); {allowed}") from error
    if not (isinstance(cls, type) and issubclass(cls, KINDS[kind])):
        raise UserError(f"{kind} method {name!r} is not a subclass of stages.contract.{KINDS[kind].__name__}")
    cls.name = name
    return cls
