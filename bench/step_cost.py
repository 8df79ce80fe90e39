"""What one step costs: milliseconds by rows, by cells that are resident beside them, and by cells they look at.

Decode rows belong to one sequence each, as in continuous batching; prompt rows all to one, which has nothing before
them, or has all the resident cells before them. With `--streams` instead: a row for each of so many sequences, each
with `--own` cells behind it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.figures import save, show
from engine.backend import Context
from engine.config import EngineConfig
from engine.llama import open_gguf

ROWS = (1, 2, 4, 8, 16, 32, 64)
RESIDENT = (0, 1024, 2048, 4096)
KINDS = {
    "decode": "decode rows, each of a sequence of its own if there are so many",
    "prompt": "prompt rows at the start of a sequence",
    "behind": "prompt rows behind the resident cells",
}


def seconds(context: Context, parts: Sequence[tuple[int, int]], *, every: bool = False) -> float:
    """One decode of so many more rows for each sequence, the last with logits, or `every` one; they are dropped
    again."""
    lengths = [context.length(seq) for seq, _ in parts]
    context.batch.clear()
    for (seq, rows), length in zip(parts, lengths, strict=True):
        context.batch.add(seq, length, [seq + 5] * rows, rows if every else 1)
    begun = time.perf_counter()
    context.decode()
    spent = time.perf_counter() - begun
    for (seq, _), length in reversed([*zip(parts, lengths, strict=True)]):  # from the top, so that none is wasted
        context.cut(seq, length)
    return spent


def typical(context: Context, parts: Sequence[tuple[int, int]], repeats: int, *, every: bool = False) -> float:
    """Milliseconds of the same: the median of `repeats` decodes after a first one."""
    return 1000 * median([seconds(context, parts, every=every) for _ in range(repeats + 1)][1:])


def fill(context: Context, seq: int, cells: int) -> None:
    """Makes `cells` cells resident in one sequence."""
    while (length := context.length(seq)) < cells:
        context.batch.clear()
        context.batch.add(seq, length, [5] * min(512, cells - length), 0)
        context.decode()


def spread(rows: int, sequences: int) -> list[tuple[int, int]]:
    """So many rows, one for each sequence, or as evenly as they can be shared out if those are fewer."""
    few, more = divmod(rows, sequences)
    return [(seq, few + (seq < more)) for seq in range(min(rows, sequences))]


def measure(
    context: Context, repeats: int, counts: Sequence[int] = ROWS, residents: Sequence[int] = RESIDENT
) -> dict[str, dict[int, dict[int, float]]]:
    """Median milliseconds: kind of rows -> resident cells -> rows."""
    figures: dict[str, dict[int, dict[int, float]]] = {kind: {} for kind in KINDS}
    last = context.sequences - 1
    for cells in residents:
        fill(context, last, cells)
        for rows in counts:
            parts = {"decode": spread(rows, last), "prompt": [(0, rows)], "behind": [(last, rows)]}
            for kind in KINDS:
                spent = typical(context, parts[kind], repeats, every=kind == "decode")
                figures[kind].setdefault(cells, {})[rows] = round(spent, 2)
    return figures


def streams(context: Context, count: int, own: int, repeats: int) -> float:
    """Median milliseconds of a row where each of `count` sequences has one, behind `own` cells."""
    for seq in range(count):
        fill(context, seq, own)
    return round(typical(context, spread(count, count), repeats) / count, 2)


def main() -> None:
    """Prints one figure, or three tables, which it writes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("-fa", "--flash-attn", choices=["auto", "on", "off"], default="off", help="flash attention")
    parser.add_argument("-ctv", "--cache-type-v", default="f16", help="type of a cell's values")
    parser.add_argument("--deterministic", action="store_true", help="in the deterministic profile")
    parser.add_argument("--repeats", type=int, default=3, help="measured decodes of each kind; the median counts")
    parser.add_argument("--streams", type=int, default=0, help="only that: sequences with a row each, 64 at most")
    parser.add_argument("--own", type=int, default=150, help="cells of each of those sequences")
    options = parser.parse_args()
    kind = f"flash attention {options.flash_attn}, {options.cache_type_v}"
    profile = "deterministic" if options.deterministic else kind
    config = EngineConfig.of(
        path=options.model,
        slots=64,
        context=max(8192, options.streams * (options.own + 1)),
        flash_attention="auto" if options.deterministic else options.flash_attn,
        cache_type_v=options.cache_type_v,
        deterministic=options.deterministic,
    )
    backend = open_gguf(config, lambda share: None, lambda: True)
    try:
        if options.streams:
            row = streams(backend.context, options.streams, options.own, options.repeats)
            print(f"{options.streams} rows, each behind {options.own} cells: {row} ms each ({profile})")
            return
        figures = measure(backend.context, options.repeats)
    finally:
        backend.close()
    for kind, table in figures.items():
        rows = [[f"{cells} resident", *by_rows.values()] for cells, by_rows in table.items()]
        show(f"{KINDS[kind]}: milliseconds of a step ({profile})", ["", *map(str, ROWS)], rows)
    save("step_cost_" + profile.replace(",", "").replace(" ", "_"), figures)


if __name__ == "__main__":
    main()
