"""Percentiles, printed tables, plots and result files, common to all measurements."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from engine.config import processor_name

# Folder of the result files.
OUT = Path(os.environ.get("OUT") or Path(__file__).parent / "out")


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value at index `share` times the number of values, of the sorted values, at most the last; NaN
    without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def spread(values: Sequence[float], scale: float = 1000.0) -> dict[str, float]:
    """Returns median, 90th and 99th percentile and maximum, times `scale` (by default from seconds to milliseconds);
    empty without values."""
    if not values:
        return {}
    figures = {"p50": median(values), "p90": percentile(values, 0.9), "p99": percentile(values, 0.99)}
    return {name: round(scale * value, 3) for name, value in (figures | {"max": max(values)}).items()}


def figure(figures: Mapping[str, Any], path: str) -> float:
    """Returns the number at the dotted key `path` in the figures of one round; NaN if there is none."""
    value: Any = figures
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else float("nan")


def ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], path: str) -> list[float]:
    """Returns the ratio of a figure in `ours` to that in `theirs` for each round; rounds without a positive figure in
    `theirs` are skipped."""
    pairs = zip(ours, theirs, strict=False)
    return [figure(one, path) / divisor for one, other in pairs if (divisor := figure(other, path)) > 0]


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if not index else "right")
    for row in rows:
        table.add_row(*map(_text, row))
    Console(width=110).print(table)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table as Markdown, with all columns but the first aligned right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(map(_text, line))} |\n" for line in lines)


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(name: str, title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Writes a PNG of lines through points to OUT; the horizontal axis is logarithmic."""
    from matplotlib.figure import Figure  # imported here as the import takes a second

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(path := OUT / f"{name}.png", dpi=120)
    print(f"wrote {path}")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the measured packages."""
    found = {name: version(name) for name in ("paceline", "llama-cpp-python", "numpy", "uvicorn", "msgspec")}
    return {**found, "python": platform.python_version()}


def save(name: str, figures: object, *, quiet: bool = False) -> None:
    """Writes `figures` as JSON with machine, versions, date and command; prints the path unless `quiet`."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]  # without the machine's folders
    command = shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])
    about = {"machine": machine, "versions": versions(), "date": date.today().isoformat(), "command": command}
    path = OUT / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode({**about, "figures": figures}), indent=2))
    if not quiet:
        print(f"wrote {path}")
