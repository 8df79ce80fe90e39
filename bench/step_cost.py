"""What one step costs: milliseconds by rows, and by cells that are resident beside them.

Decode rows belong to one sequence each, as in continuous batching; prompt rows all belong to one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from bench.figures import save, show
from engine.backend import Context
from engine.config import EngineConfig
from engine.llama import open_gguf

ROWS = (1, 2, 4, 8, 16, 32, 64)
RESIDENT = (0, 2048, 4096, 6144)


def seconds(context: Context, rows: int, *, sequences: bool) -> float:
    """One decode of `rows` rows, each of a sequence of its own or all of one."""
    context.batch.clear()
    base = [context.length(seq) for seq in range(rows)] if sequences else [0]
    if sequences:
        for seq in range(rows):
            context.batch.add(seq, base[seq], [seq + 5], 1)
    else:
        context.batch.add(0, 0, [5] * rows, 1)
    begun = time.perf_counter()
    context.decode()
    spent = time.perf_counter() - begun
    for seq, length in enumerate(base):
        context.cut(seq, length)
    return spent


def fill(context: Context, seq: int, cells: int) -> None:
    """Makes `cells` cells resident in one sequence."""
    while (length := context.length(seq)) < cells:
        context.batch.clear()
        context.batch.add(seq, length, [5] * min(512, cells - length), 0)
        context.decode()


def measure(context: Context, repeats: int) -> dict[str, dict[int, dict[int, float]]]:
    """Median milliseconds: kind of rows -> resident cells -> rows."""
    figures: dict[str, dict[int, dict[int, float]]] = {"decode": {}, "prompt": {}}
    last = context.sequences - 1
    for cells in RESIDENT:
        fill(context, last, cells)
        for kind, sequences in (("decode", True), ("prompt", False)):
            figures[kind][cells] = {}
            for rows in ROWS:
                times = [seconds(context, rows, sequences=sequences) for _ in range(repeats + 1)][1:]
                figures[kind][cells][rows] = round(1000 * median(times), 2)
    return figures


def main() -> None:
    """Prints two tables and writes `step_cost.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--repeats", type=int, default=7, help="measured decodes of each kind; the median counts")
    options = parser.parse_args()
    config = EngineConfig.of(path=options.model, slots=64, context=8192)
    backend = open_gguf(config, lambda share: None, lambda: True)
    try:
        figures = measure(backend.context, options.repeats)
    finally:
        backend.close()
    for kind, table in figures.items():
        rows = [[f"{cells} resident", *by_rows.values()] for cells, by_rows in table.items()]
        show(f"{kind} rows: milliseconds of a step", ["", *map(str, ROWS)], rows)
    save("step_cost", figures)


if __name__ == "__main__":
    main()
