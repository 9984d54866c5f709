"""Goals: the targets of a config, one by one.

A target of the config names many classes, or pairs of classes; a goal is one of them, with a quota of its own
and, for recipes that start from images of other classes, the classes whose references those are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig, FewerThan, MostConfused, Target, method_of
from pipeline.references import Lock
from schemas.errors import UserError

MATRIX = ("class", "predicted", "share")  # columns of a confusion matrix


@dataclass(frozen=True)
class Goal:
    """What is asked for: accepted images of a class, made from nothing or from images of other classes."""

    name: str  # the class as its folder is called, or "source -> class" for a pair
    label: str
    sources: tuple[str, ...]  # labels
    target: Target


def goals(config: BuildConfig, lock: Lock) -> list[Goal]:
    """Every goal, sorted by name. Raises `UserError` for classes that are not there or asked for twice."""
    found: dict[str, Goal] = {}
    for i, target in enumerate(config.targets):
        starts = {
            method_of("generate", config.recipes[name].generate).starts_from for name in config.shares(target)
        }
        if "source" not in starts and (target.sources is not None or target.pairs is not None):
            key = "sources" if target.sources is not None else "pairs"
            raise UserError(
                f"targets.{i}.{key}: no recipe of this target starts from images of another class"
                " (genie does); leave it out, or give it another recipe"
            )
        for goal in _of(config, lock, target, i, wanted="source" in starts):
            if goal.name in found:
                raise UserError(f"targets.{i}: {goal.name!r} is asked for twice; name each once")
            found[goal.name] = goal
    return [found[name] for name in sorted(found)]


def _of(config: BuildConfig, lock: Lock, target: Target, i: int, wanted: bool) -> list[Goal]:
    if target.pairs is not None:
        made = []
        for source, label in target.pairs:
            where = f"targets.{i}.pairs"
            _known(config, lock, (source, label), where)
            if source == label:
                raise UserError(f"{where}: {label!r} is both source and target; name two classes")
            made.append(Goal(f"{source} -> {label}", label, _usable(lock, (source,), label, where), target))
        return made
    labels = _labels(config, lock, target, f"targets.{i}.classes")
    if not wanted:
        return [Goal(label, label, (), target) for label in labels]
    return [Goal(label, label, _sources(config, lock, target, label, i), target) for label in labels]


def _sources(config: BuildConfig, lock: Lock, target: Target, label: str, i: int) -> tuple[str, ...]:
    where = f"targets.{i}.sources"
    match target.sources:
        case None | "all":
            others = tuple(other for other in lock.classes if other != label)
            if not others:
                raise UserError(
                    f"{where}: {label!r} is made from images of other classes, and there are none;"
                    " add references of other classes"
                )
            return others
        case MostConfused():
            raise AssertionError("settled before planning")
        case dict():
            _known(config, lock, tuple(target.sources), where)
            if label not in target.sources:
                raise UserError(
                    f"{where}: no sources for the class {label!r}; add them, or leave the class out"
                )
            chosen = target.sources[label]
        case _:
            chosen = target.sources
    _known(config, lock, chosen, where)
    if label in chosen:
        raise UserError(
            f"{where}: {label!r} is both source and target; name other classes,"
            " or give it a target of its own"
        )
    return _usable(lock, chosen, label, where)


def _usable(lock: Lock, sources: tuple[str, ...], label: str, where: str) -> tuple[str, ...]:
    for source in sources:
        if not lock.classes.get(source):
            raise UserError(
                f"{where}: no usable references of {source!r}, from which {label!r} is to be made"
            )
    return tuple(sorted(set(sources)))


def _known(config: BuildConfig, lock: Lock, labels: tuple[str, ...], where: str) -> None:
    """Raise for classes that the references do not have.

    Without references there is nothing to compare the names with: prompts alone define the classes.
    """
    if config.references is None:
        return
    seen = lock.account()
    for label in labels:
        if label not in seen:
            known = ", ".join(list(seen)[:30])
            raise UserError(f"{where}: no references of class {label!r}; classes there: {known}")


def _labels(config: BuildConfig, lock: Lock, target: Target, where: str) -> list[str]:
    if isinstance(target.classes, tuple):
        _known(config, lock, target.classes, where)
        return list(target.classes)
    if not lock.account():
        raise UserError(f"{where}: needs `references` to know the classes; set them or list the classes")
    if isinstance(target.classes, FewerThan):
        limit = target.classes.fewer_than
        labels = [label for label in lock.account() if len(lock.classes.get(label, ())) < limit]
        if not labels:
            raise UserError(f"{where}: no class has fewer than {limit} references")
        return labels
    return list(lock.account())


def settle(config: BuildConfig, lock: Lock) -> BuildConfig:
    """The config with the sources that its confusion matrices say, so that it no longer depends on them."""
    settled = tuple(
        target.model_copy(update={"sources": _of_matrix(target.sources, config, lock, target, i)})
        if isinstance(target.sources, MostConfused)
        else target
        for i, target in enumerate(config.targets)
    )
    return config.model_copy(update={"targets": settled})


def _of_matrix(
    asked: MostConfused, config: BuildConfig, lock: Lock, target: Target, i: int
) -> dict[str, tuple[str, ...]]:
    """Class of the target → the classes with references with which it is most confused."""
    where = f"targets.{i}.sources.matrix"
    labels = _labels(config, lock, target, f"targets.{i}.classes")
    try:
        with fsspec.open(asked.matrix, "rb") as file:
            table = pq.read_table(file, columns=list(MATRIX))
        shares = table["share"].cast(pa.float64()).to_pylist()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: {asked.matrix!r} cannot be read as Parquet with the columns {', '.join(MATRIX)}"
            f" ({reason}); `seedloom evaluate confusion` writes one"
        ) from error
    names = {config.readable(label): label for label in lock.classes} | {
        label: label for label in lock.classes
    }
    one, other = ([names.get(name) for name in table[key].to_pylist()] for key in ("class", "predicted"))
    rows = [dict(zip(MATRIX, row, strict=True)) for row in zip(one, other, shares, strict=True)]
    chosen = most_confused(rows, asked.most_confused, lock.classes)
    for label in labels:
        if label not in chosen:
            raise UserError(
                f"{where}: {asked.matrix!r} confuses {label!r} with no other class of the references;"
                " leave it out, or name its sources in a target of its own"
            )
    return {label: chosen[label] for label in labels}


def most_confused(
    rows: Iterable[Mapping[str, Any]], count: int, labels: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Class → the `count` classes that are taken for it, or it for them, with the largest shares in sum.

    No other classes than `labels` are looked at; equals go by their names.
    """
    shares: dict[str, dict[str, float]] = {label: defaultdict(float) for label in sorted(labels)}
    for row in rows:
        one, other, share = (row[key] for key in MATRIX)
        if one != other and one in shares and other in shares and share is not None and share > 0:
            shares[one][other] += share
            shares[other][one] += share
    return {
        label: tuple(sorted(sorted(found, key=lambda other: (-found[other], other))[:count]))
        for label, found in shares.items()
        if found
    }
