"""Percentiles, tables and result files, the same for every measurement."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from engine.config import processor

OUT = Path(os.environ.get("OUT") or Path(__file__).parent / "out")
"""Where the JSON of each measurement goes."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed; not a number if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def spread(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    """Median, 90th and 99th percentile and maximum; seconds become milliseconds."""
    if not values:
        return {}
    figures = {"p50": median(values), "p90": percentile(values, 0.9), "p99": percentile(values, 0.99)}
    return {name: round(scale * value, 3) for name, value in (figures | {"max": max(values)}).items()}


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if not index else "right")
    for row in rows:
        table.add_row(*map(_text, row))
    Console(width=110).print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same as Markdown."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(map(_text, line))} |\n" for line in lines)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(name: str, title: str, across: str, up: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws lines through points as a PNG, on a logarithmic axis across."""
    from matplotlib.figure import Figure  # it takes a second, and few measurements draw

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(title=title, xlabel=across, ylabel=up)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(path := OUT / f"{name}.png", dpi=120)
    print(f"wrote {path}")


def save(name: str, figures: object) -> None:
    """Writes `figures`, and what they were measured on, as JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    content = msgspec.json.encode({"machine": machine, "figures": figures})
    path = OUT / f"{name}.json"
    path.write_bytes(msgspec.json.format(content, indent=2))
    print(f"wrote {path}")
