"""The first steps of a context: they page in the weights and measure the cost of a pass by its rows.

The result is kept in a file for the next start with the same model, library, settings and processor; the load factor
is measured at every start.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import Struct

from engine.backend import Context, Part
from engine.pace.cost import StepCost
from engine.pace.curve import Curve
from engine.pace.passes import Layout, SequenceRows
from engine.replacement import Replacement

log = logging.getLogger("paceline.pace")

# Rows of the trial prompt at most; few enough to be quick on a large model.
PROMPT_ROWS = 32
# The quickest of so many runs counts where a small difference matters.
TRIES = 3
# Measured numbers of rows in the order of their importance.
COUNTS = (1, 4, 16, 8, 2, 32, 12, 3, 6, 5, 7, 24, 64, 20, 48, 28, 40, 14, 10, 15, 11, 13, 9, 18, 96, 128, 192, 256, 512)
# Number of measurements that a calibrated count is worth.
SEEN = 3
# No other count is measured after so many seconds or, if that is longer, steps of one row; never after the last.
SECONDS, STEPS, LONGEST = 2.2, 40, 5.0
# Decode rows of the step that shows the cost of cells.
FEW = 4
# With per-slot KV, cells of each sequence of that step: at most, and at least for a difference above the noise.
FILLED_CELLS, LEAST_FILLED_CELLS = 1024, 128
# Share of the time of a calibration that may be spent on computing these cells if states cannot be shifted.
FILL_SHARE = 0.25
# Version of the files and of the measurement.
FORMAT = 2


class Measured(Struct, frozen=True, forbid_unknown_fields=True):
    """Result of a calibration. Times are seconds."""

    rows: dict[int, float]
    """A pass by its rows, all with logits, without the cells that they attend to."""
    row_cell: float
    """A pair of a row and an attended cell; 0 if that could not be measured."""
    prompt_row: float
    """A row of a prompt in a step without decoding sequences."""
    unified: bool = True
    """KV layout of the context."""
    flash: bool = False
    """True if attention skips the cells of a pass that a row does not attend to."""


def calibrate(context: Context) -> Measured:
    """Measures for a few seconds passes of each number of rows, a prompt of `PROMPT_ROWS`, and the cost of cells.

    The rows of a pass with per-slot KV are of one sequence each, as in decoding, as far as there are sequences; else,
    and beyond that, all of one sequence. The context is empty before and afterwards.
    """
    layout = Layout.of(context)
    _seconds(context, _rows(context, 1))
    begun = time.perf_counter()
    until = begun + min(LONGEST, max(SECONDS, STEPS * _seconds(context, _rows(context, 1))))
    most = min(context.outputs, context.batch.capacity, context.sequence_cells, context.ubatch)
    found: dict[int, float] = {}
    for _ in range(TRIES):
        for rows in COUNTS:
            if rows <= most and (rows == 1 or time.perf_counter() < until):
                spent = _seconds(context, _rows(context, rows))
                found[rows] = min(spent, found.get(rows, spent))
    few = _rows(context, max(rows for rows in found if rows <= FEW))
    bare = min(found[_count(few)], *(_seconds(context, few) for _ in range(TRIES)))
    prompt = min(PROMPT_ROWS, context.batch.capacity, context.sequence_cells)
    prompt_row = _seconds(context, [SequenceRows(0, prompt)], outputs=1, keep=True) / prompt
    computed = max(prompt, int(FILL_SHARE * (until - begun) / prompt_row))
    row_cell = _row_cell(context, layout, (prompt, computed), few, bare)
    context.clear()
    for rows in found:
        cells = row_cell * layout.shape(_rows(context, rows)).attended
        found[rows] = max(found[rows] - cells, 0.5 * found[rows])
    log.info("measured %d counts of rows in %.1f s", len(found), time.perf_counter() - begun)
    return Measured(found, row_cell, prompt_row, layout.unified, layout.flash)


def warm_up(context: Context, measured: Measured | None) -> StepCost:
    """Returns the cost of steps by `measured`, with the load factor of a few rows that are computed now.

    `None` if nothing was measured: the cost is learned from steps. The context is empty before and afterwards.
    """
    cost = StepCost(layout=Layout.of(context))
    if measured is not None:
        cost = StepCost(Curve(measured.rows, SEEN), cost.layout)
        cost.row_cell = measured.row_cell
        cost.observe(cost.layout.shape(()), PROMPT_ROWS, PROMPT_ROWS * measured.prompt_row)
    one = _rows(context, 1)
    _seconds(context, one)
    cost.start(cost.layout.shape(one), min(_seconds(context, one) for _ in range(TRIES)))
    context.clear()
    return cost


# ── steps ──


def _rows(context: Context, rows: int) -> list[SequenceRows]:
    """Returns the rows of a pass as they are computed in decoding, in the empty context."""
    if context.unified or rows > context.sequences:
        return [SequenceRows(0, rows)]
    return [SequenceRows(seq, 1) for seq in range(rows)]


def _count(parts: Sequence[SequenceRows]) -> int:
    return sum(part.rows for part in parts)


def _seconds(
    context: Context, parts: Sequence[SequenceRows], *, outputs: int | None = None, keep: bool = False
) -> float:
    """Returns the seconds of a decode of `parts`, each with `outputs` rows of logits, by default all.

    The sequences are cut back to their cells unless `keep`.
    """
    context.batch.clear()
    for seq, rows, cells in parts:
        context.batch.add(seq, cells, [0] * rows, rows if outputs is None else outputs)
    begun = time.perf_counter()
    context.decode()
    seconds = time.perf_counter() - begun
    if not keep:
        for seq, _, cells in parts:
            context.cut(seq, cells)
    return seconds


# ── cells ──


def _row_cell(
    context: Context, layout: Layout, cells: tuple[int, int], few: Sequence[SequenceRows], bare: float
) -> float:
    """Returns the seconds of a pair of a row and an attended cell, 0 if they cannot be measured.

    Sequence 0, the only one of the context, has the first number of `cells`, and may be extended to the second by
    computing. Copies of its cells are attended to. `bare` are the seconds of `few` without these.
    """
    if not (context.partial and context.divisible):
        return 0.0
    if layout.unified:
        resident, parts = _fill_pool(context, cells[0]), list(few)
    else:
        resident, each = 0, _fill_slots(context, cells, len(few))
        parts = [part._replace(cells=each) for part in few]
    more = layout.shape(parts, resident).attended - layout.shape(few).attended
    if more <= 0:
        return 0.0
    filled = min(_seconds(context, parts) for _ in range(TRIES))
    return max(0.0, (filled - bare) / more)


def _fill_pool(context: Context, cells: int) -> int:
    """Moves the cells of sequence 0 to as many others as fit; returns the number of cells that those have then."""
    snapshot = context.save(0) if context.cells >= 4 * cells else None
    state = snapshot.cut(0, cells) if snapshot is not None else None
    context.cut(0, 0)
    if state is None:
        return 0
    most = min(context.sequences - 1, context.cells // cells - 2)
    return cells * sum(context.load(seq, [Part(state, 0, cells)]) for seq in range(1, 1 + most))


def _fill_slots(context: Context, cells: tuple[int, int], sequences: int) -> int:
    """Extends sequence 0, by shifted copies of its cells if possible, and copies it to the first `sequences`.

    Returns the number of cells that each of these has then; 0 if those are too few.
    """
    most, (filled, computed) = min(FILLED_CELLS, context.sequence_cells - 1), cells
    while context.shifts and 2 * filled <= most:
        snapshot = context.save(0)
        state = snapshot.cut(0, filled) if snapshot is not None else None
        shifted = context.shift(state, 0, filled, filled) if state is not None else None
        if shifted is None or not context.load(0, [Part(shifted, filled, 2 * filled)]):
            break
        filled *= 2
    affordable = min(most, computed)
    while affordable >= LEAST_FILLED_CELLS and filled < affordable:
        rows = min(affordable - filled, context.batch.capacity)
        _seconds(context, [SequenceRows(0, rows, filled)], outputs=0, keep=True)
        filled += rows
    copied = filled >= LEAST_FILLED_CELLS and all(context.copy(0, seq, filled) for seq in range(1, sequences))
    return filled if copied else 0


# ── from one start to the next ──


def folder() -> Path:
    """Returns the folder of calibrations: `$XDG_CACHE_HOME/paceline`, or else `~/.cache/paceline`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def kept(key: str) -> Measured | None:
    """Returns the calibration kept for `key`, a text of everything that matters; `None` if none can be read."""
    try:
        measured = msgspec.json.decode(_path(key).read_bytes(), type=Measured)
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return None
    good = 1 in measured.rows and all(rows > 0 and seconds > 0 for rows, seconds in measured.rows.items())
    return measured if good and measured.row_cell >= 0 and measured.prompt_row > 0 else None


def keep(key: str, measured: Measured) -> None:
    """Keeps a calibration for the next start; only logs a failure, as nothing depends on the file."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(path, f"{path.stem}.", ".part") as new:
            new.file.write(msgspec.json.encode(measured))
            new.commit(durable=False)
    except (OSError, RuntimeError) as error:
        log.warning("cannot keep the calibration: %s", error)


def _path(key: str) -> Path:
    return folder() / f"cost-{blake2b(f'{FORMAT} {key}'.encode(), digest_size=12).hexdigest()}.json"
