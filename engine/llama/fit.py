"""The number of cells that fit the free memory of the GPUs, for `--fit on`.

llama.cpp's programs fit memory, its library does not. Here contexts of two sizes are opened, and the memory of a
context on a device is computed as a fixed part plus a part for each cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, repeat
from typing import NamedTuple

from engine.llama.layout import PAD_CELLS, round_down

# Cells of the two contexts that are measured.
SMALL_CELLS, LARGE_CELLS = 1024, 9216

# Opens and closes a context with a number of cells. Returns the bytes that the context takes on each device.
Measure = Callable[[int], Mapping[str, int]]


class MemoryUse(NamedTuple):
    """Memory that a context takes on a device: `fixed_bytes + cells * cell_bytes`."""

    fixed_bytes: float
    cell_bytes: float


def reserved_bytes(targets: str, devices: Iterable[str]) -> dict[str, int]:
    """Returns the bytes that must stay free on each device. `targets` has numbers of MiB, separated by commas, the last
    for all further devices. Raises ValueError."""
    words = [word.strip() for word in targets.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
        raise ValueError(f"--fit-target {targets} is no list of MiB: use whole numbers, such as 1024 or 1024,512")
    return dict(
        zip(devices, chain((int(word) * 2**20 for word in words), repeat(int(words[-1]) * 2**20)), strict=False)
    )


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


def fitting_cells(
    free: Mapping[str, int],
    uses: Mapping[str, MemoryUse],
    reserved: Mapping[str, int],
    limit: int,
    minimum: int = PAD_CELLS,
) -> int:
    """Returns the number of cells that fit every device: a multiple of `PAD_CELLS`, at most `limit`. `free` has the
    free bytes of each device, `reserved` the bytes that must stay free. Raises TooLittleMemory if fewer than `minimum`
    cells fit."""
    count = float(limit)
    for device, use in uses.items():
        if not use.cell_bytes:  # a device without cells sets no limit, even if it is full
            continue
        left = free[device] - reserved.get(device, 0) - use.fixed_bytes
        if left < minimum * use.cell_bytes:
            context = "any context" if minimum <= PAD_CELLS else f"the {minimum} cells of --fit-ctx"
            raise TooLittleMemory(f"{device} has {free[device] / 2**20:.0f} MiB free, too little for {context}")
        count = min(count, left / use.cell_bytes)
    return round_down(count)
