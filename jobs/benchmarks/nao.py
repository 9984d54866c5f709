"""`seedloom benchmark nao`: the exact solution of NAO beside the published optimiser, on one thread of a CPU.

Random seeds z ~ N(0, I). For each pair a path of n points, both ends counted, by LERP, SLERP, the exact
solution and the authors' Adam; for each group a centroid and the paths of n points from its seeds to it, by
the last two.

- continuous: ∫ −log χ_d(|γ|)·|dγ| along the curve that a method returns. LERP, SLERP and the exact path are
  curves; what the optimiser returns are points, and the curve is the polyline through them.
- discrete: the midpoint sum over the n points, which is what the optimiser minimises. Few points can underrun
  the integral by stepping over what is between them.
- off span: the largest share of a returned latent's energy that lies outside the span of the seeds.
- kurtosis: the excess kurtosis, of all returned latents the one farthest from 0, which is that of noise. For
  centroids both are of the centroid.

Objectives are means, times medians: of the exact solution over all its calls, of the optimiser over one call
for each pair or group.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.benchmarks.machine import hardware, versions

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = {11: 100, 50: 1000}  # points of a path → times faster
SIZES = (3, 5, 10, 25)  # seeds in a group, as in the papers
CENTROID_POINTS = 11  # of the path from each seed to the centroid
CALLS = 5  # of the exact solution for each pair or group
SEED = 7


def nao(
    pairs: Annotated[int, typer.Option(min=1, help="Pairs for paths of 11 points.")] = 10,
    long_pairs: Annotated[int, typer.Option(min=0, help="Pairs for paths of 50 points, 24 s each.")] = 3,
    groups: Annotated[int, typer.Option(min=0, help="Groups of each size.")] = 1,
    d: Annotated[int, typer.Option(min=4, help="Elements of a latent; 16384: 512-pixel SD.")] = 16384,
    quick: Annotated[bool, typer.Option("--quick", help="2 pairs of 11 points, and one group of 3.")] = False,
    out: Annotated[Path, typer.Option(help="Where the figures are written as JSON.")] = Path("nao.json"),
) -> None:
    """Compare NAO's exact paths and centroids with the published optimiser: objective, time, Gaussianity."""
    facts = measure(2, 0, {3: 1}, d) if quick else measure(pairs, long_pairs, dict.fromkeys(SIZES, groups), d)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    show(facts)
    print(f"figures: {out}")


def measure(pairs: int, long_pairs: int, groups: dict[int, int], d: int) -> dict[str, Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        constants = _timed(lambda: _warm_up(d))[1]
        rng = torch.Generator().manual_seed(SEED)
        paths = [
            _compare_paths(torch.randn(count, 2, 1, 1, d, generator=rng), n)
            for n, count in zip(TARGETS, (pairs, long_pairs), strict=True)
            if count
        ]
        centroids = [
            _compare_centroids(torch.randn(count, k, 1, 1, d, generator=rng))
            for k, count in groups.items()
            if count
        ]
    finally:
        torch.set_num_threads(threads)
    return {
        "d": d,
        "paths": paths,
        "centroids": centroids,
        "targets": _targets(paths, centroids),
        "constants_seconds": round(constants, 4),  # of a number of dimensions, made once and not counted
        "threads": 1,
        "hardware": hardware(),
        "versions": versions("torch", "numpy", "scipy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _warm_up(d: int) -> None:
    import torch

    from stages.combine.nao import nao_path

    z = torch.randn(2, 1, 1, d, generator=torch.Generator().manual_seed(0))
    nao_path(z[0], z[1], 3)


def _compare_paths(z_B2CHW: Tensor, n: int) -> dict[str, Any]:
    """What each method makes of each pair."""
    import torch

    from stages.combine.lerp import lerp
    from stages.combine.nao import curve_cost, distance, line_cost, nao_path
    from stages.combine.nao_adam import adam_path
    from stages.combine.slerp import slerp

    def along(way: Callable[[Tensor, Tensor, float], Tensor], a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([way(a, b, i / (n - 1)) for i in range(n)])

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "lerp": lambda a, b: along(lerp, a, b),
        "slerp": lambda a, b: along(slerp, a, b),
        "exact": lambda a, b: nao_path(a, b, n),
        "adam": lambda a, b: adam_path(a, b, n),
    }
    curves: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "lerp": lambda a, b, path: line_cost(torch.stack([a, b])),
        "slerp": lambda a, b, path: curve_cost(lambda t: slerp(a, b, t)),
        "exact": lambda a, b, path: distance(a, b),
        "adam": lambda a, b, path: line_cost(path),
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for z_2CHW in z_B2CHW:
        a, b = z_2CHW
        for name, way in ways.items():
            path, seconds = _timed(partial(way, a, b), 1 if name == "adam" else CALLS)
            cost = float(curves[name](a.double(), b.double(), path))
            rows[name].append(_row(path, path, cost, seconds, z_2CHW))
    return {"points": n, "pairs": len(z_B2CHW), **_summary(rows)}


def _compare_centroids(z_BKCHW: Tensor) -> dict[str, Any]:
    """What the exact solution and the optimiser make of each group."""
    from stages.combine.nao import distance, line_cost, nao_centroid_paths
    from stages.combine.nao_adam import adam_centroid

    rows: dict[str, list[dict[str, float]]] = {"exact": [], "adam": []}
    n = CENTROID_POINTS
    for z_KCHW in z_BKCHW:
        paths, seconds = _timed(partial(nao_centroid_paths, z_KCHW, n), CALLS)
        c_KCHW = paths[:, -1]
        cost = float(distance(z_KCHW.double(), c_KCHW.double()).sum())
        rows["exact"].append(_row(c_KCHW[0], paths, cost, seconds, z_KCHW))
        (c_CHW, paths), seconds = _timed(partial(adam_centroid, z_KCHW, n))
        rows["adam"].append(_row(c_CHW, paths, float(line_cost(paths).sum()), seconds, z_KCHW))
    return {"seeds": z_BKCHW.shape[1], "points": n, "groups": len(z_BKCHW), **_summary(rows)}


def _timed(step: Callable[[], Any], calls: int = 1) -> tuple[Any, float]:
    """What it makes, and the median time of its calls."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        made = step()
        seconds.append(time.perf_counter() - begin)
    return made, statistics.median(seconds)


def _row(judged: Tensor, paths: Tensor, continuous: float, seconds: float, of: Tensor) -> dict[str, float]:
    import torch

    from stages.combine.nao_adam import discrete_cost

    basis = torch.linalg.qr(of.double().flatten(1).T).Q
    x = judged.double().reshape(-1, len(basis))
    deviation = x - x.mean(dim=1, keepdim=True)
    kurtosis = deviation.pow(4).mean(dim=1) / deviation.square().mean(dim=1).square() - 3
    return {
        "continuous": continuous,
        "discrete": float(discrete_cost(paths.double()).sum()),
        "seconds": seconds,
        "off_span": float((1 - (x @ basis).square().sum(dim=1) / x.square().sum(dim=1)).clamp(min=0).max()),
        "kurtosis": float(kurtosis[kurtosis.abs().argmax()]),
    }


def _summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Figures of each method, and of the exact solution against the optimiser."""
    exact, adam = rows["exact"], rows["adam"]
    return {
        "methods": {
            name: {
                "continuous": statistics.fmean(row["continuous"] for row in made),
                "discrete": statistics.fmean(row["discrete"] for row in made),
                "seconds": statistics.median(row["seconds"] for row in made),
                "off_span": max(row["off_span"] for row in made),
                "kurtosis": max((row["kurtosis"] for row in made), key=abs),
            }
            for name, made in rows.items()
        },
        "worse": sum(e["continuous"] > a["continuous"] for e, a in zip(exact, adam, strict=True)),
        "faster": statistics.median(a["seconds"] / e["seconds"] for e, a in zip(exact, adam, strict=True)),
    }


def _targets(paths: list[dict[str, Any]], centroids: list[dict[str, Any]]) -> list[dict[str, Any]]:
    compared = [*paths, *centroids]
    cases = sum(c.get("pairs", 0) + c.get("groups", 0) for c in compared)
    worse = sum(c["worse"] for c in compared)
    lines = [
        {
            "target": "continuous objective never worse than the optimiser's",
            "measured": f"worse in {worse} of {cases} pairs and groups",
            "reached": worse == 0,
        }
    ]
    for n, factor in TARGETS.items():
        for what, given in (("path", paths), ("centroid", centroids)):
            at = [c for c in given if c["points"] == n]
            if at:
                slowest = min(c["faster"] for c in at)
                lines.append(
                    {
                        "target": f"{what} of {n} points at least {factor} times faster",
                        "measured": f"{slowest:,.1f} times"
                        + (", the least of all sizes" if len(at) > 1 else ""),
                        "reached": slowest >= factor,
                    }
                )
    return lines


def show(facts: dict[str, Any]) -> None:
    """The figures as a table, the targets below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"NAO in {facts['d']} dimensions, one thread")
    for name in ("", "continuous", "discrete", "ms", "off span", "kurtosis", "exact faster"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for title, case in _titled(facts):
        table.add_section()
        table.add_row(title, style="bold")
        for name, row in case["methods"].items():
            table.add_row(
                f"  {name}",
                f"{row['continuous']:,.2f}",
                f"{row['discrete']:,.2f}",
                f"{row['seconds'] * 1e3:,.2f}",
                f"{row['off_span']:.1e}",
                f"{row['kurtosis']:+.3f}",
                f"{case['faster']:,.0f} ×" if name == "adam" else "",
            )
    console = Console(width=110)
    console.print(table)
    for line in facts["targets"]:
        verdict = "reached" if line["reached"] else "MISSED"
        console.print(f"{line['target']}: {line['measured']}: {verdict}", highlight=False)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    console.print(f"{facts['hardware']}; {versions}", highlight=False)


def _titled(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for case in facts["paths"]:
        yield f"paths, n = {case['points']}; pairs: {case['pairs']}", case
    for case in facts["centroids"]:
        yield f"centroids, k = {case['seeds']}; groups: {case['groups']}", case


if __name__ == "__main__":
    from jobs.entry import run

    run(nao)
