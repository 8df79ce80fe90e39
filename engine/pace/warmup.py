"""The first few rows: they page the weights in, and their cost is the first estimate of a step's."""

from __future__ import annotations

import time

from engine.backend import Context
from engine.pace.cost import StepCost

ROWS = 32
"""Rows of the trial prompt at most; few enough to be quick on a large model."""


def warm_up(context: Context, cost: StepCost) -> None:
    """Measures a step of one row and a prompt of `ROWS`, each after a first run that does not count.

    Leaves the cells empty.
    """
    for rows in (1, min(ROWS, context.batch.capacity, context.cells)):
        _seconds(context, rows)
        seconds = _seconds(context, rows)
        cost.observe(1, 0, seconds) if rows == 1 else cost.observe(0, rows, seconds)


def _seconds(context: Context, rows: int) -> float:
    context.batch.clear()
    context.batch.add(0, 0, [0] * rows, 1)
    begun = time.perf_counter()
    context.decode()
    seconds = time.perf_counter() - begun
    context.cut(0, 0)
    return seconds
