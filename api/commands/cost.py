"""`paceline cost`: measures what a step of each number of rows costs on this machine, and draws it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from api.config.command_line import OptionError, Parser, parse
from api.server.terminal import Bar, say
from engine import EngineError, Measured, step_costs

WIDTH = 24
"""Characters of the longest bar."""


def show(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 if the model cannot be opened or the picture not be written, 2 if
    the arguments make no sense."""
    parser = Parser(
        prog="paceline cost",
        usage="paceline cost -m model.gguf [-o FILE.png|FILE.json] [flags of paceline serve]",
        description=__doc__,
        allow_abbrev=False,
    )
    about = "the picture (default cost.png), or the figures if it ends in .json: for --sim-cost"
    parser.add_argument("-o", "--output", type=Path, default=Path("cost.png"), help=about)
    try:
        given, rest = parser.parse_known_args(arguments)
        options = parse(rest, os.environ)
    except OptionError as error:
        say(f"paceline cost: {error}")
        return 2
    name = Path(options.model.path).stem
    try:
        with Bar(f"Measuring {name}") as bar:
            measured = step_costs(options.engine, bar.show)
        print_curve(name, measured)
        if given.output.suffix == ".json":
            given.output.write_bytes(msgspec.json.encode(measured))
        else:
            draw(name, measured, given.output)
    except (EngineError, OSError) as error:
        say(f"paceline: {error}")
        return 1
    except ImportError:
        say("paceline: no picture without matplotlib: pip install 'paceline[plot]'")
        return 1
    say(f"Wrote {given.output}")
    return 0


def print_curve(name: str, measured: Measured, console: Console | None = None) -> None:
    """The curve as a table with bars, and the costs of a cell and of a prompt's row."""
    table = Table(title=f"{name}: a step by its rows", title_justify="left")
    for column in ("rows", "ms", "ms a row", "tokens/s if all are right"):
        table.add_column(column, justify="right")
    table.add_column("")
    longest = max(measured.rows.values())
    for rows, seconds in sorted(measured.rows.items()):
        bar = "█" * max(1, round(WIDTH * seconds / longest))
        each = 1e3 * seconds / rows
        table.add_row(str(rows), f"{1e3 * seconds:.2f}", f"{each:.2f}", f"{rows / seconds:.1f}", bar)
    console = console or Console()
    console.print(table)
    console.print(f"A row of a prompt: {1e3 * measured.prompt_row:.2f} ms.")
    console.print(f"Each row takes {1e9 * measured.row_cell:.1f} ns more for every cell that is resident.")


def draw(name: str, measured: Measured, path: Path) -> None:
    """The same as a PNG. Raises ImportError without matplotlib, OSError if it cannot be written."""
    from matplotlib.figure import Figure  # only for this, and not needed to serve

    rows, seconds = zip(*sorted(measured.rows.items()), strict=True)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows, [1e3 * each for each in seconds], marker="o", label="measured")
    axes.plot(rows, [1e3 * seconds[0] * count / rows[0] for count in rows], ls=":", label="as if each were alone")
    axes.set(title=f"{name}: what a step costs", xlabel="rows", ylabel="milliseconds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
