"""The first steps: they page the weights in and measure what a step of each number of rows costs.

What was measured is kept in a file for the next start with the same model, library, settings and processor; how fast
the machine is today is measured again.
"""

from __future__ import annotations

import logging
import os
import time
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import Struct

from engine.backend import Context
from engine.pace.cost import StepCost
from engine.pace.curve import Curve
from engine.replacement import Replacement

log = logging.getLogger("paceline.pace")

ROWS = 32
"""Rows of the trial prompt at most; few enough to be quick on a large model."""
TRIES = 3
"""Runs of which the quickest counts where a small difference matters."""
COUNTS = (1, 4, 16, 8, 2, 32, 12, 3, 6, 5, 7, 24, 64, 20, 48, 28, 40, 14, 10, 15, 11, 13, 9, 18, 96, 128, 192, 256, 512)
"""Numbers of rows, those first without which least would be known."""
SEEN = 3
"""Measurements that a calibrated count is worth."""
SECONDS, STEPS, LONGEST = 2.2, 40, 5.0
"""No other count is measured after so many seconds or, if that is longer, steps of one row; never after the last."""


class Measured(Struct, frozen=True, forbid_unknown_fields=True):
    """What a calibration found. Times are seconds."""

    rows: dict[int, float]
    """A step by its rows, all with logits and nothing else resident."""
    row_cell: float
    """By how much a resident cell makes each row dearer; 0 if that could not be measured."""
    prompt_row: float
    """A row of a prompt that is read alone."""


def calibrate(context: Context) -> Measured:
    """Measures for a few seconds steps of each number of rows that may have logits, a prompt of `ROWS`, and what cells
    cost that no row of the step looks at; not where they must stay in order, so that none can leave for it.

    Leaves the cells empty.
    """
    _seconds(context, 1, 1)
    begun = time.perf_counter()
    until = begun + min(LONGEST, max(SECONDS, STEPS * _seconds(context, 1, 1)))
    most = min(context.outputs, context.batch.capacity, context.cells)
    found: dict[int, float] = {}
    for _ in range(TRIES):
        for rows in COUNTS:
            if rows <= most and (rows == 1 or time.perf_counter() < until):
                spent = _seconds(context, rows, rows)
                found[rows] = min(spent, found.get(rows, spent))
    prompt = min(ROWS, context.batch.capacity, context.cells)
    row_cell = 0.0
    few = max(rows for rows in found if rows <= 4)
    bare = min(found[few], *(_seconds(context, few, few) for _ in range(TRIES)))
    prompt_row = _seconds(context, prompt, 1, keep=True) / prompt
    if resident := _fill(context, prompt):
        beside = min(_seconds(context, few, few) for _ in range(TRIES))
        row_cell = max(0.0, (beside - bare) / (few * resident))
    for seq in range(context.sequences):
        context.cut(seq, 0)
    context.clear()
    log.info("measured what steps of %d counts of rows cost in %.1f s", len(found), time.perf_counter() - begun)
    return Measured(found, row_cell, prompt_row)


def warm_up(context: Context, measured: Measured | None) -> StepCost:
    """What steps cost by what was measured, and by a few rows that show how fast the machine is now. Leaves the cells
    empty."""
    cost = StepCost()
    if measured is not None:
        cost = StepCost(Curve(measured.rows, SEEN))
        cost.row_cell = measured.row_cell
        cost.observe(0, ROWS, ROWS * measured.prompt_row)
    _seconds(context, 1, 1)
    cost.start(1, min(_seconds(context, 1, 1) for _ in range(TRIES)))
    context.clear()
    return cost


def _seconds(context: Context, rows: int, outputs: int, *, keep: bool = False) -> float:
    context.batch.clear()
    context.batch.add(0, 0, [0] * rows, outputs)
    begun = time.perf_counter()
    context.decode()
    seconds = time.perf_counter() - begun
    if not keep:
        context.cut(0, 0)
        if context.ordered:  # or the cells would stay unused
            context.clear()
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


# ── from one start to the next ──


def folder() -> Path:
    """Where calibrations are kept: `$XDG_CACHE_HOME/paceline`, `~/.cache/paceline` for want of that."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def kept(key: str) -> Measured | None:
    """What was found earlier for `key`, a text that says everything that matters; None if nothing that can be read."""
    try:
        measured = msgspec.json.decode(_path(key).read_bytes(), type=Measured)
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return None
    good = 1 in measured.rows and all(rows > 0 and seconds > 0 for rows, seconds in measured.rows.items())
    return measured if good and measured.row_cell >= 0 and measured.prompt_row > 0 else None


def keep(key: str, measured: Measured) -> None:
    """Keeps it for the next start; a line in the log if that fails, as nothing depends on it."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(path, f"{path.stem}.", ".part") as new:
            new.file.write(msgspec.json.encode(measured))
            new.commit(durable=False)
    except (OSError, RuntimeError) as error:
        log.warning("cannot keep the calibration: %s", error)


def _path(key: str) -> Path:
    return folder() / f"cost-{blake2b(key.encode(), digest_size=12).hexdigest()}.json"
