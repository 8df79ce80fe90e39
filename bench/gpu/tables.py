"""Renders the figures of `bench.gpu.measure` as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.figures import markdown
from bench.step_cost import ROW_KINDS

# The figures of one part and model, by cell.
CellFigures = Mapping[str, Any]
# The names of the columns, and the rows.
Table = tuple[Sequence[str], Sequence[Sequence[object]]]


def cost_table(figures: CellFigures) -> Table:
    """Returns the milliseconds of a step by kind of rows and number of resident cells."""
    step = figures["step"]
    counts = list(next(iter(next(iter(step.values())).values())))
    rows = [
        [ROW_KINDS[kind], cells, *by_rows.values()]
        for kind, by_cells in step.items()
        for cells, by_rows in by_cells.items()
    ]
    return ("milliseconds of a step of rows", "resident cells", *counts), rows


def python_share_table(figures: CellFigures) -> Table:
    """Returns the tokens per second of a bare loop, the engine's speed in per cent of it, and Python's fraction of a
    step.

    The table has a row for each number of slots.
    """
    rows = [
        [
            slots,
            speeds["bare"],
            *(100 * speeds[sampling] / speeds["bare"] for sampling in ("greedy", "sampled")),
            *(100 * speeds[f"share_{sampling}"] for sampling in ("greedy", "sampled")),
        ]
        for slots, speeds in figures.items()
    ]
    columns = ("slots", "bare loop, tokens/s", "engine greedy, % of it", "sampled, %", "Python greedy, % of a step")
    return (*columns, "sampled, %"), rows


def load_table(figures: CellFigures) -> Table:
    """Returns tokens per second over HTTP, times to first token and gaps, by server and number of slots."""
    rows = []
    for cell, report in figures.items():
        slots, _, name = cell.partition(" ")
        spans = [report[span].get(share, float("nan")) for span, share in SPANS]
        rows.append([name, slots, report["tokens_per_second"], *spans, report["failed"]])
    spans = [f"{TITLES[span]} {share}, ms" for span, share in SPANS]
    return ("server", "slots", "tokens/s", *spans, "failed"), rows


SPANS = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("gap_ms", "p50"), ("gap_ms", "p99"))
TITLES = {"ttft_ms": "TTFT", "gap_ms": "gap"}


def gaps_table(figures: CellFigures) -> Table:
    """Returns the gaps of running streams by server."""
    names = list(next(iter(figures.values())))
    rows = [[server, *gaps.values()] for server, gaps in figures.items()]
    return ("server", *(name.replace("_", " ") for name in names)), rows


PART_TABLES: Mapping[str, tuple[str, Callable[[CellFigures], Table]]] = {
    "cost": ("cost of a step", cost_table),
    "share": ("overhead of Python", python_share_table),
    "serve": ("over HTTP, without speculation", load_table),
    "sampling": ("over HTTP, with and without backend sampling", load_table),
    "synthetic": ("over HTTP, with random acceptance of draft tokens", load_table),
    "gaps": ("running streams during a long prefill", gaps_table),
}


def render_tables(figures: Mapping[str, CellFigures]) -> str:
    """Returns a table for each part and model; the keys of `figures` are `part-model`."""
    sections = []
    for part, (title, table) in PART_TABLES.items():
        for name, cells in figures.items():
            if name.startswith(f"{part}-") and cells:
                sections.append(f"**{name.removeprefix(f'{part}-')}: {title}**\n\n{markdown(*table(cells))}")
    return "\n".join(sections)
