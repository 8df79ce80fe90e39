"""The number of cells that fit the free memory of the GPUs, for `--fit on`.

llama.cpp fits memory in its programs, not in the library. So it is measured here: contexts of two sizes are opened, and
the memory of a context on a device is taken to be a fixed part plus a part for each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from engine.llama.layout import PAD_CELLS

# Cells of the two contexts that are measured.
SMALL_CELLS, LARGE_CELLS = 1024, 9216

# Opens and closes a context with a number of cells. Returns the bytes that the context takes on each device.
Measure = Callable[[int], Mapping[str, int]]


class MemoryUse(NamedTuple):
    """Memory that a context takes on a device: `fixed_bytes + cells * cell_bytes`."""

    fixed_bytes: float
    cell_bytes: float


class TooLittleMemory(Exception):
    """A device has too little free memory for any context. The message is one line."""


def measure_memory(measure: Measure) -> dict[str, MemoryUse]:
    """Returns the memory use of a context on each device."""
    small, large = measure(SMALL_CELLS), measure(LARGE_CELLS)
    uses = {}
    for device in small:
        cell_bytes = max(0.0, (large[device] - small[device]) / (LARGE_CELLS - SMALL_CELLS))
        uses[device] = MemoryUse(small[device] - SMALL_CELLS * cell_bytes, cell_bytes)
    return uses


def fitting_cells(free: Mapping[str, int], uses: Mapping[str, MemoryUse], reserve_bytes: int, limit: int) -> int:
    """Returns the number of cells that fit every device with `reserve_bytes` left free: a multiple of `PAD_CELLS`, at
    most `limit`. `free` is the free bytes of each device. Raises TooLittleMemory."""
    count = float(limit)
    for device, use in uses.items():
        if not use.cell_bytes:  # a device without cells sets no limit, even if it is full
            continue
        left = free[device] - reserve_bytes - use.fixed_bytes
        if left < PAD_CELLS * use.cell_bytes:
            raise TooLittleMemory(f"{device} has {free[device] / 2**20:.0f} MiB free, too little for any context")
        count = min(count, left / use.cell_bytes)
    return round_down(count)


def round_down(count: float) -> int:
    """Returns `count` rounded down to a multiple of `PAD_CELLS`, at least `PAD_CELLS`."""
    return max(PAD_CELLS, int(count) // PAD_CELLS * PAD_CELLS)
