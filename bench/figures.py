"""Percentiles, tables and result files, the same for every measurement."""

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


def figure(of: Mapping[str, Any], path: str) -> float:
    """A figure of one round, `path` with a dot for each table that it lies in; not a number if there is none."""
    value: Any = of
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else float("nan")


def ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], path: str) -> list[float]:
    """Our figure to theirs, round for round; nothing for rounds in which they have none."""
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


def versions() -> dict[str, str]:
    """Of what is measured, and of Python."""
    found = {name: version(name) for name in ("paceline", "llama-cpp-python", "numpy", "uvicorn", "msgspec")}
    return {**found, "python": platform.python_version()}


def save(name: str, figures: object, *, quiet: bool = False) -> None:
    """Writes `figures`, and what, when and by which command they were measured, as JSON; says so unless `quiet`."""
    OUT.mkdir(parents=True, exist_ok=True)
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]  # no path of this machine
    command = shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])
    about = {"machine": machine, "versions": versions(), "date": date.today().isoformat(), "command": command}
    path = OUT / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode({**about, "figures": figures}), indent=2))
    if not quiet:
        print(f"wrote {path}")
