"""How many cells fit the memory that is free on the GPUs, for `--fit on`.

The library's own fitting belongs to its programs, not to the library. So what a cell takes is measured: contexts of few
and of more cells are opened, and what each took from every device's free memory lies on a straight line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

FEW, MORE = 1024, 9216
"""Cells of the two contexts that are opened to measure."""
LEAST = 256
"""The library's contexts have a multiple of so many cells."""

Taken = Callable[[int], Mapping[str, int]]
"""Opens a context of so many cells and closes it; by device the bytes that it took."""


class Need(NamedTuple):
    """What contexts take of a device: bytes however few cells there are, and bytes for each cell."""

    fixed: float
    cell: float


class TooLittle(Exception):
    """Not even the fewest cells fit, in one line."""


def needs(taken: Taken) -> dict[str, Need]:
    """What contexts take of each device."""
    few, more = taken(FEW), taken(MORE)
    found = {}
    for device in few:
        cell = max(0.0, (more[device] - few[device]) / (MORE - FEW))
        found[device] = Need(few[device] - FEW * cell, cell)
    return found


def cells(free: Mapping[str, int], needed: Mapping[str, Need], reserve: int, most: int) -> int:
    """The cells for which there is memory wherever they lie with `reserve` bytes to spare, a multiple of 256 and at
    most `most`. Raises TooLittle."""
    count = float(most)
    for device, need in needed.items():
        if not need.cell:  # the model may not be there, and somebody else's may
            continue
        left = free[device] - reserve - need.fixed
        if left < LEAST * need.cell:
            raise TooLittle(f"{device} has {free[device] / 2**20:.0f} MiB free, too little for any context")
        count = min(count, left / need.cell)
    return rounded(count)


def rounded(count: float) -> int:
    """So many cells or a little less, as the library's contexts have them."""
    return max(LEAST, int(count) // LEAST * LEAST)
