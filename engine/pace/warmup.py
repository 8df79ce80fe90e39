"""The first few rows: they page the weights in, and their cost is the first estimate of a step's."""

from __future__ import annotations

import time

from engine.backend import Context
from engine.pace.cost import StepCost

ROWS = 32
"""Rows of the trial prompt at most; few enough to be quick on a large model."""
TRIES = 3
"""Runs of which the quickest counts where a small difference matters."""


def warm_up(context: Context, cost: StepCost, *, cells: bool = True) -> None:
    """Measures a step of one row, a prompt of `ROWS`, each after a first run that does not count, and, with `cells`,
    what those cost that no row of the step looks at; not where they must stay in order, so that none can leave for it.

    Leaves the cells empty.
    """
    _seconds(context, 1)
    bare = min(_seconds(context, 1) for _ in range(TRIES))
    cost.observe(1, 0, bare)
    rows = min(ROWS, context.batch.capacity, context.cells)
    _seconds(context, rows)
    cost.observe(0, rows, _seconds(context, rows, keep=True))
    if cells and (resident := _fill(context, rows)):
        beside = min(_seconds(context, 1) for _ in range(TRIES))
        cost.cell = max(0.0, (beside - bare) / resident)
    for seq in range(context.sequences):
        context.cut(seq, 0)
    context.clear()


def _seconds(context: Context, rows: int, *, keep: bool = False) -> float:
    context.batch.clear()
    context.batch.add(0, 0, [0] * rows, 1)
    begun = time.perf_counter()
    context.decode()
    seconds = time.perf_counter() - begun
    if not keep:
        context.cut(0, 0)
    return seconds


def _fill(context: Context, rows: int) -> int:
    """Moves the first `rows` cells of sequence 0 to as many others as fit; how many cells those have then."""
    if not context.partial or context.ordered or context.cells < 4 * rows:
        return 0
    state = context.save(0, 0, rows)
    context.cut(0, 0)
    most = min(context.sequences - 1, context.cells // rows - 2)
    if state is None:
        return 0
    return rows * sum(context.load(seq, state, 0, rows) for seq in range(1, 1 + most))
