"""Measures the cost of one step in milliseconds, by numbers of rows and of resident cells.

Decode rows belong to one sequence each, as in continuous batching. Prompt rows belong to one sequence, which is empty
or has all resident cells. With unified KV the resident cells are those of one other sequence; with per-slot KV, where
such cells cost nothing, every decoding sequence has that many cells. `--sequences N` measures one row for each of N
sequences with `--own` cells only. `--rows 1,4,1,1` measures one step with these rows for the sequence ids from 0 on; 0
omits an id.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.figures import save, show
from bench.models import SOURCES
from engine.backend import Context
from engine.config import EngineConfig
from engine.llama import open_gguf
from engine.pace import Layout, SequenceRows

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
RESIDENT_CELLS = (0, 1024, 2048, 4096)
# Slots with unified KV, and with per-slot KV, where each slot needs cells of its own.
SLOTS, PER_SLOT_SLOTS = 64, 16
ROW_KINDS = {
    "decode": "decode rows, one for each sequence",
    "prompt": "prompt rows at the start of a sequence",
    "behind": "prompt rows after the resident cells",
}


def decode_seconds(context: Context, parts: Sequence[tuple[int, int]], *, all_logits: bool = False) -> float:
    """Returns the seconds of one decode of `parts`, pairs of a sequence id and its number of rows.

    The last row of each part has logits, or every row if `all_logits`. The sequences are then cut back to their
    lengths.
    """
    lengths = [context.length(seq) for seq, _ in parts]
    context.batch.clear()
    for (seq, rows), length in zip(parts, lengths, strict=True):
        context.batch.add(seq, length, [seq + 5] * rows, rows if all_logits else 1)
    begun = time.perf_counter()
    context.decode()
    spent = time.perf_counter() - begun
    for (seq, _), length in zip(parts, lengths, strict=True):
        context.cut(seq, length)
    return spent


def median_milliseconds(
    context: Context, parts: Sequence[tuple[int, int]], repeats: int, *, all_logits: bool = False
) -> float:
    """Returns the median milliseconds of `repeats` decodes of `parts` after a warm-up."""
    return 1000 * median([decode_seconds(context, parts, all_logits=all_logits) for _ in range(repeats + 1)][1:])


def fill(context: Context, seq: int, cells: int) -> None:
    """Extends one sequence to `cells` cells."""
    while (length := context.length(seq)) < cells:
        context.batch.clear()
        context.batch.add(seq, length, [5] * min(512, cells - length), 0)
        context.decode()


def divide_rows(rows: int, sequences: int) -> list[tuple[int, int]]:
    """Returns pairs of a sequence id and its rows: `rows` divided evenly among at most `sequences` sequences."""
    few, more = divmod(rows, sequences)
    return [(seq, few + (seq < more)) for seq in range(min(rows, sequences))]


def measure(
    context: Context, repeats: int, counts: Sequence[int] = ROW_COUNTS, residents: Sequence[int] = RESIDENT_CELLS
) -> dict[str, dict[int, dict[int, float]]]:
    """Returns the median milliseconds by kind of rows, number of resident cells, and number of rows."""
    figures: dict[str, dict[int, dict[int, float]]] = {kind: {} for kind in ROW_KINDS}
    last = context.sequences - 1
    for cells in residents:
        for seq in [last] if context.unified else range(context.sequences):
            fill(context, seq, cells)
        for rows in counts:
            figures["decode"].setdefault(cells, {})[rows] = _rounded(
                context, divide_rows(rows, last), repeats, all_logits=True
            )
            figures["behind"].setdefault(cells, {})[rows] = _rounded(context, [(last, rows)], repeats)
        if not context.unified:
            context.cut(last, 0)
        empty = 0 if context.unified else last
        for rows in counts:
            figures["prompt"].setdefault(cells, {})[rows] = _rounded(context, [(empty, rows)], repeats)
    return figures


def _rounded(context: Context, parts: Sequence[tuple[int, int]], repeats: int, *, all_logits: bool = False) -> float:
    return round(median_milliseconds(context, parts, repeats, all_logits=all_logits), 2)


def even_step_milliseconds(context: Context, count: int, own: int, repeats: int) -> float:
    """Returns the median milliseconds per row of a step with one row for each of `count` sequences of `own` cells."""
    for seq in range(count):
        fill(context, seq, own)
    return round(median_milliseconds(context, divide_rows(count, count), repeats) / count, 2)


def one_step(context: Context, counts: Sequence[int], own: int, repeats: int) -> str:
    """Returns a line about a step in which sequence id i has `counts[i]` rows after `own` cells."""
    parts = [(seq, rows) for seq, rows in enumerate(counts) if rows]
    for seq, _ in parts:
        fill(context, seq, own)
    shape = Layout.of(context).shape([SequenceRows(seq, rows, own) for seq, rows in parts], own * len(parts))
    spent = median_milliseconds(context, parts, repeats, all_logits=True)
    return f"{spent:.2f} ms, passes of {', '.join(map(str, shape.passes))} rows, {shape.attended} attended cells"


def arguments() -> argparse.Namespace:
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--kv", choices=["per-slot", "unified"], default="per-slot", help="KV layout")
    parser.add_argument("-fa", "--flash-attn", choices=["auto", "on", "off"], default="off", help="flash attention")
    parser.add_argument("-ctv", "--cache-type-v", default="f16", help="type of a cell's values")
    parser.add_argument("--deterministic", action="store_true", help="use the deterministic profile")
    parser.add_argument("--repeats", type=int, default=3, help="decodes of each kind; the result is their median")
    parser.add_argument("--sequences", "--streams", type=int, default=0, help="measure only N sequences of a row each")
    parser.add_argument("--rows", default="", help="measure only a step of these rows by sequence, separated by commas")
    parser.add_argument("--own", type=int, default=150, help="cells of each of those sequences")
    options = parser.parse_args()
    options.counts = [int(rows) for rows in options.rows.split(",")] if options.rows else []
    return options


def configuration(options: argparse.Namespace) -> EngineConfig:
    """Returns an engine configuration with enough cells for the measurement."""
    unified = options.kv == "unified"
    few = len(options.counts) or options.sequences
    slots = SLOTS if unified else few or PER_SLOT_SLOTS
    own = options.own + max(options.counts, default=1) if few else max(RESIDENT_CELLS) + max(ROW_COUNTS)
    return EngineConfig.of(
        path=options.model,
        slots=slots,
        context=max(8192, (few or 1) * own) if unified else slots * own,
        kv_unified=unified,
        flash_attention="auto" if options.deterministic else options.flash_attn,
        cache_type_v=options.cache_type_v,
        deterministic=options.deterministic,
    )


def main() -> None:
    """Prints one figure, or prints three tables and writes them as JSON."""
    options = arguments()
    kind = f"{options.kv} KV, flash attention {options.flash_attn}, {options.cache_type_v}"
    profile = "deterministic" if options.deterministic else kind
    backend = open_gguf(configuration(options), lambda share: None, lambda: True)
    try:
        if options.counts:
            print(one_step(backend.context, options.counts, options.own, options.repeats), f"({profile})")
            return
        if options.sequences:
            row = even_step_milliseconds(backend.context, options.sequences, options.own, options.repeats)
            print(f"{options.sequences} rows, each after {options.own} cells: {row} ms per row ({profile})")
            return
        figures = measure(backend.context, options.repeats)
    finally:
        backend.close()
    for kind, table in figures.items():
        rows = [[f"{cells} cells", *by_rows.values()] for cells, by_rows in table.items()]
        show(f"{ROW_KINDS[kind]}: milliseconds of a step ({profile})", ["", *map(str, ROW_COUNTS)], rows)
    save("step_cost_" + profile.replace(",", "").replace(" ", "_"), figures)


if __name__ == "__main__":
    main()
