"""The figures of `bench.gpu.measure` as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.figures import markdown
from bench.step_cost import KINDS

Figures = Mapping[str, Any]
"""What was measured of one part and model, by cell."""
Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""Columns and rows."""


def cost(figures: Figures) -> Table:
    """Milliseconds, a line for each kind of rows and number of resident cells."""
    step = figures["step"]
    counts = list(next(iter(next(iter(step.values())).values())))
    rows = [[KINDS[kind], cells, *by_rows.values()] for kind, of in step.items() for cells, by_rows in of.items()]
    return ("milliseconds of a step of rows", "resident cells", *counts), rows


def share(figures: Figures) -> Table:
    """Tokens a second of a bare loop, the engine's share of these, Python's share of a step, a line for each slots."""
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


def load(figures: Figures) -> Table:
    """Tokens a second over HTTP, time to first text and gaps, a line for each slots and server."""
    rows = []
    for cell, of in figures.items():
        slots, _, name = cell.partition(" ")
        spans = [of[span].get(share, float("nan")) for span, share in SPANS]
        rows.append([name, slots, of["tokens_per_second"], *spans, of["failed"]])
    spans = [f"{TITLES[span]} {share}, ms" for span, share in SPANS]
    return ("server", "slots", "tokens/s", *spans, "failed"), rows


SPANS = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("gap_ms", "p50"), ("gap_ms", "p99"))
TITLES = {"ttft_ms": "first text", "gap_ms": "gap"}


def gaps(figures: Figures) -> Table:
    """A line for each server."""
    names = list(next(iter(figures.values())))
    rows = [[server, *of.values()] for server, of in figures.items()]
    return ("server", *(name.replace("_", " ") for name in names)), rows


PARTS: Mapping[str, tuple[str, Callable[[Figures], Table]]] = {
    "cost": ("what a step costs", cost),
    "share": ("what Python takes", share),
    "serve": ("over HTTP, without speculation", load),
    "synthetic": ("over HTTP, each drafted token right by chance", load),
    "gaps": ("streams beside a long prompt", gaps),
}


def all_of(figures: Mapping[str, Figures]) -> str:
    """A table for each part and model, by name `part-model`, in the order of the parts."""
    found = []
    for part, (title, table) in PARTS.items():
        for name, cells in figures.items():
            if name.startswith(f"{part}-") and cells:
                found.append(f"**{name.removeprefix(f'{part}-')}: {title}**\n\n{markdown(*table(cells))}")
    return "\n".join(found)
