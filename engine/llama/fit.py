"""The number of cells that fit the free memory of the GPUs, for `--fit on`.

llama.cpp's own fitting belongs to its programs, not to the library. So memory is measured: contexts of two sizes are
opened, and the memory of a device is a fixed part plus a part for each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from engine.llama.layout import PAD_CELLS

# Cells of the two measured contexts.
SMALL_CELLS, LARGE_CELLS = 1024, 9216

# Opens and closes a context of a number of cells. Returns the bytes that it takes on each device.
Measure = Callable[[int], Mapping[str, int]]


class MemoryUse(NamedTuple):
    """Bytes that a context takes on a device: a fixed part, and a part for each cell."""

    fixed: float
    cell: float


class TooLittleMemory(Exception):
    """A device has too little free memory for any context; the message is one line."""


def measure_memory(measure: Measure) -> dict[str, MemoryUse]:
    """Returns the memory use of contexts, by device."""
    small, large = measure(SMALL_CELLS), measure(LARGE_CELLS)
    uses = {}
    for device in small:
        cell = max(0.0, (large[device] - small[device]) / (LARGE_CELLS - SMALL_CELLS))
        uses[device] = MemoryUse(small[device] - SMALL_CELLS * cell, cell)
    return uses


def fitting_cells(free: Mapping[str, int], uses: Mapping[str, MemoryUse], reserve: int, limit: int) -> int:
    """Returns the cells that fit every device with `reserve` bytes left free, a multiple of `PAD_CELLS` and at most
    `limit`. Raises TooLittleMemory."""
    count = float(limit)
    for device, use in uses.items():
        if not use.cell:  # a device without cells may be full of another process's memory
            continue
        left = free[device] - reserve - use.fixed
        if left < PAD_CELLS * use.cell:
            raise TooLittleMemory(f"{device} has {free[device] / 2**20:.0f} MiB free, too little for any context")
        count = min(count, left / use.cell)
    return round_down(count)


def round_down(count: float) -> int:
    """Returns `count` rounded down to a multiple of `PAD_CELLS`, at least `PAD_CELLS`."""
    return max(PAD_CELLS, int(count) // PAD_CELLS * PAD_CELLS)
