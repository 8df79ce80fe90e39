"""Calibration: the first steps of a context, which page in the weights and measure the seconds of a pass by its rows.

The result is saved in a file for the next start with the same model, library, settings and processor. Only the load
factor is measured at each start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import Struct

from engine.backend import Context, StatePart
from engine.checksummed import AtomicFile
from engine.config import cache_folder
from engine.pace.cost import StepCost
from engine.pace.curve import Curve
from engine.pace.passes import Layout, SequenceRows

log = logging.getLogger("paceline.pace")

# Maximum rows of the measured prompt; few enough for a large model.
_PROMPT_ROWS = 32
# Number of repetitions of a measurement, of which the shortest counts.
_RUNS = 3
# Numbers of rows that are measured, in order of importance, as the time may not suffice for all.
_ROW_COUNTS = (
    1,
    4,
    16,
    8,
    2,
    32,
    12,
    3,
    6,
    5,
    7,
    24,
    64,
    20,
    48,
    28,
    40,
    14,
    10,
    15,
    11,
    13,
    9,
    18,
    96,
    128,
    192,
    256,
    512,
)
# A calibrated point of the curve has the weight of this many measurements.
CALIBRATED_WEIGHT = 3
# A calibration ends after `_MIN_SECONDS` or, if that is longer, the time of `_MIN_STEPS` steps of one row, but after
# `_MAX_SECONDS` at the latest.
_MIN_SECONDS, _MIN_STEPS, _MAX_SECONDS = 2.2, 40, 5.0
# Maximum rows of the step that measures the cost of cells.
_CELL_STEP_ROWS = 4
# Per-slot KV: maximum cells of each sequence in that step, and the minimum for a difference above the noise.
_MAX_FILLED_CELLS, _MIN_FILLED_CELLS = 1024, 128
# Share of the time of a calibration that may be spent on computing such cells if states cannot be shifted.
_FILL_SHARE = 0.25
# Version of the file format and of the method of measurement.
_FORMAT = 2


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """Result of a calibration. Costs are in seconds."""

    rows: dict[int, float]
    """Seconds of a pass by its rows, all with logits, without the cost of attended cells."""
    row_cell: float
    """Seconds of a pair of a row and an attended cell; 0 if this cost could not be measured."""
    prompt_row: float
    """Seconds of a prompt row in a step without decoding sequences."""
    unified: bool = True
    """KV layout of the context."""
    flash: bool = False
    """True if attention skips the cells of a pass that a row does not attend to."""


def calibrate(context: Context) -> Calibration:
    """Measures passes of different numbers of rows, a prompt of `_PROMPT_ROWS`, and the cost of cells, in a few
    seconds.

    With per-slot KV each row of a pass is of another sequence, as in decoding. With unified KV, and for more rows than
    there are sequences, all rows are of one sequence. The context must be empty, and is empty afterwards.
    """
    layout = Layout.of(context)
    _step_seconds(context, _rows(context, 1))
    begun = time.perf_counter()
    until = begun + min(_MAX_SECONDS, max(_MIN_SECONDS, _MIN_STEPS * _step_seconds(context, _rows(context, 1))))
    max_rows = min(context.outputs, context.batch.capacity, context.sequence_cells, context.ubatch)
    seconds: dict[int, float] = {}  # the shortest, by rows
    for _ in range(_RUNS):
        for rows in _ROW_COUNTS:
            if rows <= max_rows and (rows == 1 or time.perf_counter() < until):
                measured = _step_seconds(context, _rows(context, rows))
                seconds[rows] = min(measured, seconds.get(rows, measured))
    few_rows = _rows(context, max(rows for rows in seconds if rows <= _CELL_STEP_ROWS))
    bare_seconds = min(seconds[_count(few_rows)], *(_step_seconds(context, few_rows) for _ in range(_RUNS)))
    prompt = min(_PROMPT_ROWS, context.batch.capacity, context.sequence_cells)
    prompt_row = _step_seconds(context, [SequenceRows(0, prompt)], outputs=1, keep=True) / prompt
    affordable = max(prompt, int(_FILL_SHARE * (until - begun) / prompt_row))
    row_cell = _row_cell(context, layout, (prompt, affordable), few_rows, bare_seconds)
    context.clear()
    for rows in seconds:
        cell_seconds = row_cell * layout.shape(_rows(context, rows)).attended
        seconds[rows] = max(seconds[rows] - cell_seconds, 0.5 * seconds[rows])
    log.info("calibration: measured passes of %d sizes in %.1f s", len(seconds), time.perf_counter() - begun)
    return Calibration(seconds, row_cell, prompt_row, layout.unified, layout.flash)


def warm_up(context: Context, calibration: Calibration | None) -> StepCost:
    """Returns the cost model with the costs of `calibration`, and a load factor measured by a few steps now.

    `None` means that there are no measurements: the costs are learned from steps. The context must be empty, and is
    empty afterwards.
    """
    cost = StepCost(layout=Layout.of(context))
    if calibration is not None:
        cost = StepCost(Curve(calibration.rows, CALIBRATED_WEIGHT), cost.layout)
        cost.row_cell = calibration.row_cell
        cost.observe(cost.layout.shape(()), _PROMPT_ROWS, _PROMPT_ROWS * calibration.prompt_row)
    one = _rows(context, 1)
    _step_seconds(context, one)
    cost.set_load_factor(cost.layout.shape(one), min(_step_seconds(context, one) for _ in range(_RUNS)))
    context.clear()
    return cost


# ── steps ──


def _rows(context: Context, rows: int) -> list[SequenceRows]:
    """Returns `rows` rows of a pass on empty sequences, as in decoding if there are enough sequences."""
    if context.unified or rows > context.sequences:
        return [SequenceRows(0, rows)]
    return [SequenceRows(seq, 1) for seq in range(rows)]


def _count(parts: Sequence[SequenceRows]) -> int:
    return sum(part.rows for part in parts)


def _step_seconds(
    context: Context, parts: Sequence[SequenceRows], *, outputs: int | None = None, keep: bool = False
) -> float:
    """Returns the seconds of a decode of `parts`, each with `outputs` rows of logits. `None` means that all rows have
    logits.

    Afterwards the sequences are cut back to the cells that they had before, unless `keep`.
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
    context: Context, layout: Layout, cells: tuple[int, int], rows: Sequence[SequenceRows], bare_seconds: float
) -> float:
    """Returns the seconds of a pair of a row and an attended cell; 0 if the cost cannot be measured.

    The step of `rows` is measured with many attended cells, and `bare_seconds` is its time without them. Sequence 0,
    the only one of the context, has `cells[0]` cells, and may be extended to `cells[1]` cells by computing. The
    attended cells are copies of its cells.
    """
    if not (context.partial and context.divisible):
        return 0.0
    if layout.unified:
        resident, parts = _fill_pool(context, cells[0]), list(rows)
    else:
        resident, slot_cells = 0, _fill_slots(context, cells, len(rows))
        parts = [part._replace(cells=slot_cells) for part in rows]
    attended = layout.shape(parts, resident).attended - layout.shape(rows).attended
    if attended <= 0:
        return 0.0
    filled_seconds = min(_step_seconds(context, parts) for _ in range(_RUNS))
    return max(0.0, (filled_seconds - bare_seconds) / attended)


def _fill_pool(context: Context, cells: int) -> int:
    """Copies the cells of sequence 0 to as many other sequences as fit, and empties sequence 0. Returns the number of
    cells that the other sequences have together."""
    snapshot = context.save(0) if context.cells >= 4 * cells else None
    state = snapshot.cut(0, cells) if snapshot is not None else None
    context.cut(0, 0)
    if state is None:
        return 0
    copies = min(context.sequences - 1, context.cells // cells - 2)
    return cells * sum(context.load(seq, [StatePart(state, 0, cells)]) for seq in range(1, 1 + copies))


def _fill_slots(context: Context, cells: tuple[int, int], sequences: int) -> int:
    """Extends sequence 0, by shifted copies of its cells if possible, and copies it to the other of the first
    `sequences` ids.

    Returns the number of cells of each of these sequences; 0 if there are fewer than `_MIN_FILLED_CELLS`.
    """
    max_cells, (filled, computable) = min(_MAX_FILLED_CELLS, context.sequence_cells - _CELL_STEP_ROWS), cells
    while context.shifts and 2 * filled <= max_cells:
        snapshot = context.save(0)
        state = snapshot.cut(0, filled) if snapshot is not None else None
        shifted = context.shift(state, 0, filled, filled) if state is not None else None
        if shifted is None or not context.load(0, [StatePart(shifted, filled, 2 * filled)]):
            break
        filled *= 2
    affordable = min(max_cells, computable)
    while affordable >= _MIN_FILLED_CELLS and filled < affordable:
        rows = min(affordable - filled, context.batch.capacity)
        _step_seconds(context, [SequenceRows(0, rows, filled)], outputs=0, keep=True)
        filled += rows
    copied = filled >= _MIN_FILLED_CELLS and all(context.copy(0, seq, filled) for seq in range(1, sequences))
    return filled if copied else 0


# ── from one start to the next ──


def load_calibration(key: str) -> Calibration | None:
    """Returns the calibration saved for `key`, a string of all properties that it depends on. `None` if there is no
    valid file."""
    try:
        calibration = msgspec.json.decode(_path(key).read_bytes(), type=Calibration)
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return None
    valid = 1 in calibration.rows and all(rows > 0 and seconds > 0 for rows, seconds in calibration.rows.items())
    return calibration if valid and calibration.row_cell >= 0 and calibration.prompt_row > 0 else None


def save_calibration(key: str, calibration: Calibration) -> None:
    """Saves a calibration for the next start. A failure is only logged, because the file is optional."""
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with AtomicFile(path, f"{path.stem}.", ".part") as new:
            new.file.write(msgspec.json.encode(calibration))
            new.commit(durable=False)
    except (OSError, RuntimeError) as error:
        log.warning("cannot save the calibration: %s", error)


def _path(key: str) -> Path:
    return cache_folder() / f"cost-{blake2b(f'{_FORMAT} {key}'.encode(), digest_size=12).hexdigest()}.json"
