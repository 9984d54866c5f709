"""What an evaluation leaves behind: Parquet, tables in the terminal, a figure, and a summary in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table as Grid

from jobs.evaluate.harness import Result
from jobs.evaluate.metrics import LEAST_GROUPS, Difference, Measure
from stages.shard import parquet

FIGURES = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("conditions", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),  # of the 95 % interval
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("dimensions", pa.int64()),  # of the feature space
        pa.field("build", pa.string()),
    ]
)
DIFFERENCES = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
        pa.field("against", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),  # of the row, less that of the other
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("verdict", pa.string(), nullable=False),  # higher, lower, not shown
    ]
)


@dataclass(frozen=True)
class Heading:
    """How a metric is written."""

    title: str
    form: str = ".3f"  # of its values
    logarithmic: bool = False  # in the figure
    biased: bool = False  # by an n that is small for the number of features


Headings = Mapping[str, Heading]


def write(
    folder: Path,
    name: str,
    results: Sequence[Result],
    headings: Headings,
    notes: Sequence[str],
    page: Any = None,
) -> list[Path]:
    """Write NAME.parquet, NAME_differences.parquet, NAME.png and NAME.txt, and print tables and summary.

    `page` is the figure; by default `picture` of all tables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}{end}" for end in (".parquet", "_differences.parquet", ".png", ".txt")]
    files[0].write_bytes(parquet.write(list(_figure_rows(results)), FIGURES))
    files[1].write_bytes(parquet.write(list(_difference_rows(results)), DIFFERENCES))
    (page or picture(results, headings)).savefig(files[2], dpi=110)
    console = Console(width=None if Console().is_terminal else 200, highlight=False, markup=False)
    words = "\n".join([*(line for result in results for line in summary(result, headings)), *notes])
    for result in results:
        console.print(grid(result, headings))
    console.print(words)
    with files[3].open("w", encoding="utf-8") as text:
        plain = Console(file=text, width=200, highlight=False, markup=False)
        for result in results:
            plain.print(grid(result, headings))
        plain.print(words)
    return files


def _figure_rows(results: Sequence[Result]) -> Any:
    for result in results:
        for row, figures in result.rows.items():
            for metric, m in figures.items():
                yield {
                    "table": result.name,
                    "conditions": result.title,
                    "row": row,
                    "metric": metric,
                    "value": m.value,
                    "low": m.low,
                    "high": m.high,
                    "n": m.n,
                    "dimensions": m.dimensions,
                    "build": result.builds.get(row),
                }


def _difference_rows(results: Sequence[Result]) -> Any:
    for result in results:
        for (row, against, metric), d in result.differences.items():
            yield {
                "table": result.name,
                "row": row,
                "against": against,
                "metric": metric,
                "value": d.value,
                "low": d.low,
                "high": d.high,
                "verdict": d.verdict,
            }


# --- in words -----------------------------------------------------------------------------------------------


def grid(result: Result, headings: Headings) -> Grid:
    """The table as it is printed: a figure, its interval, and what n it rests on."""
    metrics = [m for m in headings if any(m in figures for figures in result.rows.values())]
    table = Grid(title=f"{result.name}: {result.title}", title_justify="left")
    table.add_column("")
    for metric in metrics:
        table.add_column(f"{headings[metric].title}{_basis(result, metric, headings[metric])}")
    for row, figures in result.rows.items():
        table.add_row(row, *(cell(figures.get(metric), headings[metric]) for metric in metrics))
    return table


def cell(measure: Measure | None, heading: Heading) -> str:
    """A figure with its interval; empty where there is none."""
    if measure is None:
        return ""
    value = format(measure.value, heading.form)
    if measure.low is None or measure.high is None:
        return value
    return f"{value} [{format(measure.low, heading.form)}, {format(measure.high, heading.form)}]"


def _basis(result: Result, metric: str, heading: Heading) -> str:
    """The n and the feature dimension of a column; n as a span where it differs between rows."""
    measures = [figures[metric] for figures in result.rows.values() if metric in figures]
    low, high = min(m.n for m in measures), max(m.n for m in measures)
    text = f"\nn = {low}" if low == high else f"\nn = {low} to {high}"
    if measures[0].dimensions is not None:
        text += f", {measures[0].dimensions} features"
        text += " (n is smaller: biased)" if heading.biased and low < measures[0].dimensions else ""
    return text


def summary(result: Result, headings: Headings) -> list[str]:
    """A line for each two rows that the table compares."""
    told: dict[tuple[str, str], list[str]] = {}
    for (row, against, metric), d in result.differences.items():
        text = f"{headings[metric].title} {difference(d, headings[metric])}"
        told.setdefault((row, against), []).append(text)
    lines = [f"{result.name}: {row} against {against}: {'; '.join(t)}" for (row, against), t in told.items()]
    if lines:
        count = len(result.differences)
        lines.append(
            f"{result.name}: each of these {count} intervals is a 95 % one by itself; of so many comparisons"
            f" about {count * 0.05:.0f} would seem shown where there is nothing"
        )
    return lines


def difference(d: Difference, heading: Heading) -> str:
    """higher or lower by how much, or not shown."""
    form = f"+{heading.form}"
    if d.low is None or d.high is None:
        return f"not shown ({format(d.value, form)}, fewer than {LEAST_GROUPS} groups of images)"
    return f"{d.verdict} ({format(d.value, form)} [{format(d.low, form)}, {format(d.high, form)}])"


# --- as a picture -------------------------------------------------------------------------------------------


def picture(results: Sequence[Result], headings: Headings) -> Any:
    """A panel for each table and metric: a point a row, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [m for m in headings if any(m in f for result in results for f in result.rows.values())]
    heights = [len(result.rows) * 0.28 + 1.0 for result in results]
    page = Figure(figsize=(2.2 + 2.3 * len(metrics), sum(heights)), layout="constrained")
    FigureCanvasAgg(page)
    panels = page.subplots(len(results), len(metrics), squeeze=False, height_ratios=heights)
    for result, line in zip(results, panels, strict=True):
        names = list(result.rows)
        for metric, panel in zip(metrics, line, strict=True):
            if not any(metric in figures for figures in result.rows.values()):
                panel.set_axis_off()
                continue
            panel.set_title(headings[metric].title, fontsize=8)
            panel.set_yticks(range(len(names)), names if panel is line[0] else [""] * len(names), fontsize=7)
            panel.set_ylim(len(names) - 0.5, -0.5)
            panel.tick_params(axis="x", labelsize=6)
            panel.grid(axis="x", linewidth=0.4, alpha=0.5)
            if headings[metric].logarithmic:
                panel.set_xscale("log", nonpositive="clip")
            for place, figures in enumerate(result.rows.values()):
                m = figures.get(metric)
                if m is None:
                    continue
                if m.low is not None and m.high is not None:
                    panel.plot([m.low, m.high], [place, place], color="#1f77b4", linewidth=2, alpha=0.5)
                panel.plot([m.value], [place], "o", color="#1f77b4", markersize=4)
            if headings[metric].logarithmic:
                plain_ticks(panel.xaxis)
        line[0].set_ylabel(result.name, fontsize=8)
    return page


def plain_ticks(axis: Any) -> None:
    """Few ticks on a logarithmic axis that has been drawn on, as numbers and not as powers."""
    from math import log10

    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if log10(high / low) < 2.5 else (1,), numticks=6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
