"""How many cells fit the memory that is free on the GPUs, for `--fit on`.

The library's own fitting belongs to its programs, not to the library. So the bytes of a cell are measured: contexts of
few and of more cells are opened, and the memory that each takes of a device is a fixed part and a part for each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from engine.llama.layout import PAD_CELLS

# Cells of the two contexts that are opened to measure.
FEW, MORE = 1024, 9216

# Opens a context of so many cells and closes it; returns the bytes that it took of each device.
Taken = Callable[[int], Mapping[str, int]]


class Need(NamedTuple):
    """Bytes that contexts take of a device: a fixed part, and a part for each cell."""

    fixed: float
    cell: float


class TooLittle(Exception):
    """A device has too little free memory for any context; the message is one line."""


def needs(taken: Taken) -> dict[str, Need]:
    """Bytes that contexts take, by device."""
    few, more = taken(FEW), taken(MORE)
    found = {}
    for device in few:
        cell = max(0.0, (more[device] - few[device]) / (MORE - FEW))
        found[device] = Need(few[device] - FEW * cell, cell)
    return found


def cells(free: Mapping[str, int], needed: Mapping[str, Need], reserve: int, most: int) -> int:
    """The cells that fit every device with `reserve` bytes left free, a multiple of 256 and at most `most`. Raises
    TooLittle."""
    count = float(most)
    for device, need in needed.items():
        if not need.cell:  # a device without cells may be full of another process's memory
            continue
        left = free[device] - reserve - need.fixed
        if left < PAD_CELLS * need.cell:
            raise TooLittle(f"{device} has {free[device] / 2**20:.0f} MiB free, too little for any context")
        count = min(count, left / need.cell)
    return rounded(count)


def rounded(count: float) -> int:
    """`count` rounded down to the multiple of cells that the library's contexts have, but at least that."""
    return max(PAD_CELLS, int(count) // PAD_CELLS * PAD_CELLS)
