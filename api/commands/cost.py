"""`paceline cost`: measures the cost of a step by number of rows on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from api.config.arguments import take_option
from api.config.command_line import OptionError, parse
from api.hub.errors import HubError
from api.hub.resolve import resolve_models
from api.server.terminal import ProgressBar, print_line
from engine import Calibration, EngineError, measure_step_costs

_USAGE = """\
usage: paceline cost -m model.gguf [-o FILE.png|FILE.json] [flags of paceline serve]

Measures the cost of a step by number of rows on this machine.

  -o, --output FILE   plot of the costs (default: cost.png), or with the suffix .json the costs as JSON for --sim-cost
"""
_BAR_CHARS = 24


def run_cost(arguments: Sequence[str]) -> int:
    """Prints the costs, writes the output file and returns the exit code.

    1 means that the model cannot be opened or the file cannot be written, 2 that the arguments are invalid.
    """
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE)
        return 0
    try:
        output, rest = take_option(arguments, "-o", "--output")
        options = parse(rest, os.environ)
    except OptionError as error:
        print_line(f"paceline cost: {error}")
        return 2
    path = Path(output or "cost.png")
    try:
        options = resolve_models(options, print_line)
        name = Path(options.model.path).stem
        with ProgressBar(f"Measuring {name}") as bar:
            calibration = measure_step_costs(options.engine, bar.update)
        print_costs(name, calibration)
        if path.suffix == ".json":
            path.write_bytes(msgspec.json.encode(calibration))
        else:
            plot_costs(name, calibration, path)
    except (EngineError, HubError, OSError) as error:
        print_line(f"paceline: {error}")
        return 1
    except ImportError:
        print_line("paceline: the plot needs matplotlib: pip install 'paceline[plot]'")
        return 1
    print_line(f"Wrote {path}")
    return 0


def print_costs(name: str, calibration: Calibration, console: Console | None = None) -> None:
    """Prints a table of the costs with a bar for each row count, then the costs per prompt row and attended KV cell."""
    table = Table(title=f"{name}: cost of a step by number of rows", title_justify="left")
    for column in ("rows", "ms", "ms per row", "tokens/s if all rows are accepted"):
        table.add_column(column, justify="right")
    table.add_column("")
    longest = max(calibration.rows.values())
    for rows, seconds in sorted(calibration.rows.items()):
        bar = "█" * max(1, round(_BAR_CHARS * seconds / longest))
        table.add_row(str(rows), f"{1e3 * seconds:.2f}", f"{1e3 * seconds / rows:.2f}", f"{rows / seconds:.1f}", bar)
    console = console or Console()
    console.print(table)
    console.print(f"A prompt row costs {1e3 * calibration.prompt_row:.2f} ms.")
    console.print(f"Each KV cell that a row attends to adds {1e9 * calibration.row_cell:.1f} ns.")


def plot_costs(name: str, calibration: Calibration, path: Path) -> None:
    """Writes the costs as a PNG. Raises ImportError without matplotlib, OSError if `path` cannot be written."""
    from matplotlib.figure import Figure  # optional: `serve` runs without it

    rows, seconds = zip(*sorted(calibration.rows.items()), strict=True)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows, [1e3 * each for each in seconds], marker="o", label="measured")
    axes.plot(rows, [1e3 * seconds[0] * count / rows[0] for count in rows], ls=":", label="proportional to rows")
    axes.set(title=f"{name}: cost of a step", xlabel="rows", ylabel="milliseconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
