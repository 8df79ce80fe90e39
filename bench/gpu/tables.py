"""Renders the figures of `bench.gpu.measure` as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.figures import markdown
from bench.step_cost import ROW_KINDS

# The figures of one part and model, by cell.
CellFigures = Mapping[str, Any]
# Columns and rows.
Table = tuple[Sequence[str], Sequence[Sequence[object]]]


def cost(figures: CellFigures) -> Table:
    """Returns the milliseconds of a step by kind of rows and number of resident cells."""
    step = figures["step"]
    counts = list(next(iter(next(iter(step.values())).values())))
    rows = [[ROW_KINDS[kind], cells, *by_rows.values()] for kind, of in step.items() for cells, by_rows in of.items()]
    return ("milliseconds of a step of rows", "resident cells", *counts), rows


def share(figures: CellFigures) -> Table:
    """Returns by number of slots the tokens per second of a bare loop, those of the engine in per cent of the bare
    loop, and Python's fraction of a step."""
    rows = [
        [
            slots,
            of["bare"],
            *(100 * of[way] / of["bare"] for way in ("greedy", "sampled")),
            *(100 * of[f"share_{way}"] for way in ("greedy", "sampled")),
        ]
        for slots, of in figures.items()
    ]
    columns = ("slots", "bare loop, tokens/s", "engine greedy, % of it", "sampled, %", "Python greedy, % of a step")
    return (*columns, "sampled, %"), rows


def load(figures: CellFigures) -> Table:
    """Returns by server and number of slots the tokens per second over HTTP, time to first token and gaps."""
    rows = []
    for cell, of in figures.items():
        slots, _, name = cell.partition(" ")
        spans = [of[span].get(share, float("nan")) for span, share in SPANS]
        rows.append([name, slots, of["tokens_per_second"], *spans, of["failed"]])
    spans = [f"{TITLES[span]} {share}, ms" for span, share in SPANS]
    return ("server", "slots", "tokens/s", *spans, "failed"), rows


SPANS = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("gap_ms", "p50"), ("gap_ms", "p99"))
TITLES = {"ttft_ms": "TTFT", "gap_ms": "gap"}


def gaps(figures: CellFigures) -> Table:
    """Returns the gaps of running streams by server."""
    names = list(next(iter(figures.values())))
    rows = [[server, *of.values()] for server, of in figures.items()]
    return ("server", *(name.replace("_", " ") for name in names)), rows


PART_TABLES: Mapping[str, tuple[str, Callable[[CellFigures], Table]]] = {
    "cost": ("cost of a step", cost),
    "share": ("overhead of Python", share),
    "serve": ("over HTTP, without speculation", load),
    "synthetic": ("over HTTP, with random acceptance of draft tokens", load),
    "gaps": ("running streams during a long prefill", gaps),
}


def all_of(figures: Mapping[str, CellFigures]) -> str:
    """Returns a table for each part and model; the keys of `figures` are `part-model`."""
    found = []
    for part, (title, table) in PART_TABLES.items():
        for name, cells in figures.items():
            if name.startswith(f"{part}-") and cells:
                found.append(f"**{name.removeprefix(f'{part}-')}: {title}**\n\n{markdown(*table(cells))}")
    return "\n".join(found)
