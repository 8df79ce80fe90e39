"""Computes the passes over the weights of one decode, and the cells that its rows attend to. Pure functions of counts.

llama.cpp splits a batch into passes (`llama-batch.cpp`). With unified KV a pass takes the next `ubatch` rows
(`split_simple`). With per-slot KV a pass takes sequences whose ids are consecutive, each with the same number of rows
(`split_equal`, sequential). Rows are given in ascending order of their sequence ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import Context
from engine.pace.recurrent_passes import RecurrentPass, recurrent_passes

# `llama_kv_cache::get_n_kv` rounds the cells of a pass up to a multiple of this.
PADDED_CELLS = 256

# Numbers of rows, [columns, steps], or of tokens, [drafts, steps], in alternative steps.
StepMatrix = NDArray[np.int16]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class SequenceRows(NamedTuple):
    """Number of rows of one sequence in a step, and number of cells that the sequence has before the step."""

    seq: int
    rows: int = 1
    cells: int = 0


class Pass(NamedTuple):
    """One pass: `rows` rows of each of `sequences` consecutive sequences, the first of which has index `first`.

    With unified KV all rows of a pass count as rows of one sequence with index 0.
    """

    first: int
    sequences: int
    rows: int

    @property
    def total(self) -> int:
        """Rows of all sequences of the pass."""
        return self.sequences * self.rows


class StepShape(NamedTuple):
    """The properties of a step that determine its cost."""

    passes: tuple[int, ...] = ()
    """Rows of each pass."""
    attended: int = 0
    """Number of pairs of a row and a cell for which attention is computed."""

    @property
    def rows(self) -> int:
        """Rows of all passes."""
        return sum(self.passes)


class Layout(NamedTuple):
    """The properties of a context that determine passes and attended cells."""

    unified: bool = True
    """True for unified KV, False for per-slot KV."""
    ubatch: int = 512
    """Maximum rows of a pass."""
    flash: bool = False
    """True if attention skips the cells of a pass that a row does not attend to."""
    recurrent: bool = False
    """True if layers have recurrent states, so that all sequences of a pass have the same number of rows."""
    max_rollback: int = 0
    """With `recurrent`: maximum rows of a sequence that can be rolled back."""

    @classmethod
    def of(cls, context: Context) -> Layout:
        """Returns the layout of `context`."""
        return cls(context.unified, context.ubatch, context.flash, not context.partial, context.max_rollback or 0)

    def passes(self, rows: Sequence[SequenceRows]) -> tuple[Pass, ...]:
        """Returns the passes of a step of `rows`; see the function `passes`. With `recurrent` the first sequence of a
        pass is not determined."""
        if self.recurrent:
            placed = sorted(rows, key=lambda part: (part.rows, part.seq))
            return tuple(Pass(0, len(each.seqs), each.rows) for each in self.recurrent_passes(placed))
        return passes(rows, self.unified, self.ubatch)

    def recurrent_passes(self, rows: Iterable[SequenceRows]) -> list[RecurrentPass]:
        """Returns the passes of a step of `rows`, in the order of the batch, with `recurrent`."""
        tail = self.max_rollback + 1 if self.max_rollback else 0
        counts = [(part.seq, part.rows) for part in rows]
        return recurrent_passes(counts, self.ubatch, tail, consecutive=not self.unified)

    def shape(self, rows: Sequence[SequenceRows], resident: int = 0) -> StepShape:
        """Returns the shape of a step of `rows`. `resident` is the number of cells in use by all sequences."""
        found = self.passes(rows)
        return StepShape(tuple(each.total for each in found), attended(rows, found, self, resident))

    def even(self, sequences: int, cells: int = 0) -> StepShape:
        """Returns the shape of a decode of one row for each of `sequences` sequences, which have `cells` cells
        together."""
        each = cells // max(1, sequences)
        return self.shape([SequenceRows(seq, 1, each) for seq in range(sequences)], cells)


def passes(rows: Sequence[SequenceRows], unified: bool, ubatch: int) -> tuple[Pass, ...]:
    """Returns the passes of a step of `rows`, in the order in which llama.cpp computes them."""
    if unified:
        full, rest = divmod(sum(part.rows for part in rows), ubatch)
        return (Pass(0, 1, ubatch),) * full + ((Pass(0, 1, rest),) if rest else ())
    heights, found = [part.rows for part in rows], list[Pass]()
    if rows and rows[-1].seq - rows[0].seq + 1 == len(rows):  # consecutive ids, as in most steps
        return tuple(_passes_of_run(0, heights, ubatch))
    gaps = [i for i, (one, other) in enumerate(pairwise(rows), 1) if other.seq != one.seq + 1]
    for first, end in pairwise((0, *gaps, len(rows))):
        found += _passes_of_run(first, heights[first:end], ubatch)
    return tuple(found)


def _passes_of_run(start: int, left: list[int], ubatch: int) -> list[Pass]:
    """Returns the passes of sequences with consecutive ids, which have `left` rows. The first one has index `start`."""
    count, lowest = len(left), min(left, default=0)
    if lowest and lowest * count <= ubatch and lowest == max(left):  # equal rows, as in most steps
        return [Pass(start, count, lowest)]
    found, first = list[Pass](), 0
    while first < count:
        if not left[first]:
            first += 1
            continue
        # llama.cpp's `split_equal` stops only once it has one sequence more than `ubatch`.
        end, limit = first + 1, min(count, first + ubatch + 1)
        while end < limit and left[end]:
            end += 1
        part = left[first:end]
        each = min(min(part), max(1, ubatch // len(part)))
        left[first:end] = [rows - each for rows in part]
        found.append(Pass(start + first, end - first, each))
    return found


def attended(rows: Sequence[SequenceRows], found: Sequence[Pass], layout: Layout, resident: int = 0) -> int:
    """Returns the pairs of a row and a cell for which attention is computed in the passes `found` of `rows`.

    With unified KV a row attends to all `resident` cells. With per-slot KV and flash attention it attends to the cells
    of its sequence. With per-slot KV but without flash attention it costs as much as a row of the longest sequence in
    the pass. The cells that the step itself fills are left out, except for one that the padding without flash
    attention includes.
    """
    if layout.unified:
        return resident * sum(part.rows for part in rows)
    if layout.flash or layout.recurrent:
        return sum(part.rows * part.cells for part in rows)
    lengths = [part.cells for part in rows]
    return sum(each.total * padded(max(lengths[each.first : each.first + each.sequences])) for each in found)


def segments(rows: Sequence[SequenceRows], pass_cells: float) -> list[int]:
    """Returns where to cut `rows`, in ascending order of ids, into the cheapest passes: the index after each segment.

    The last index is `len(rows)`. Without flash attention a row costs as much as a row of the longest sequence of its
    pass, so a long sequence between short ones can be cheaper in a pass of its own. `pass_cells` is the cost of a pass
    in pairs of a row and a cell. The cuts are optimal for consecutive ids, by dynamic programming (as Bellman 1961 fits
    curves by segments).
    """
    lengths, count = [padded(part.cells) for part in rows], len(rows)
    max_length = max(lengths, default=0)
    if count < 2 or sum((max_length - own) * part.rows for own, part in zip(lengths, rows, strict=True)) < pass_cells:
        return [count] if count else []
    best, last = [0.0], [0]
    for end in range(1, count + 1):
        cheapest, start, longest, total = float("inf"), end, 0, 0
        for first in range(end - 1, -1, -1):
            longest, total = max(longest, lengths[first]), total + rows[first].rows
            if (cost := best[first] + pass_cells + total * longest) < cheapest:
                cheapest, start = cost, first
        best.append(cheapest)
        last.append(start)
    cuts = [count]
    while last[cuts[-1]]:
        cuts.append(last[cuts[-1]])
    return cuts[::-1]


def padded(cells: int) -> int:
    """Returns the number of cells for which a row of a sequence with `cells` cells computes attention without flash
    attention."""
    return (cells // PADDED_CELLS + 1) * PADDED_CELLS


# ── many alternative steps at once ──


class Columns(NamedTuple):
    """The sequences of a step in ascending order of ids, as arrays over columns.

    A sequence that gets a draft has a column of its own. Other sequences with consecutive ids and equal numbers of rows
    share a column. A gap between ids is a column without rows.
    """

    rows: StepMatrix
    """Rows of each sequence of the column, [columns]."""
    sequences: Indices
    """Number of sequences of the column."""
    cells: Floats
    """Cells of all sequences of the column together."""
    padded: Floats
    """Padded cells of the longest sequence of the column."""
    drafting: Indices
    """Indices of the columns of the sequences that get drafts, in the order of the argument `drafting` of `of`."""

    @classmethod
    def of(cls, rows: Sequence[SequenceRows], drafting: Collection[int]) -> Columns:
        """Returns the columns of `rows`. The sequences with the ids `drafting` get drafts."""
        columns: list[tuple[int, int, int, int]] = []
        column_of, next_id = dict.fromkeys(drafting, -1), -1
        for seq, count, cells in rows:
            if columns and seq != next_id:
                columns.append((0, 0, 0, 0))
            if seq in column_of:
                column_of[seq] = len(columns)
            elif columns and seq - 1 not in column_of and columns[-1][0] == count:
                _, sequences, others, most = columns.pop()
                columns.append((count, sequences + 1, others + cells, max(most, padded(cells))))
                next_id = seq + 1
                continue
            columns.append((count, 1, cells, padded(cells)))
            next_id = seq + 1
        table = np.array(columns, np.int64).reshape(len(columns), 4)
        return cls(
            table[:, 0].astype(np.int16),
            table[:, 1].astype(np.intp),
            table[:, 2].astype(np.float64),
            table[:, 3].astype(np.float64),
            np.array([*column_of.values()], np.intp),
        )

    @property
    def intervals(self) -> int:
        """Number of intervals of consecutive columns."""
        return len(self.rows) * (len(self.rows) + 1) // 2

    def heights(self, lengths: StepMatrix) -> StepMatrix:
        """Returns the rows of each sequence by column and step, if draft i has `lengths[i, k]` tokens in step k."""
        heights = np.repeat(self.rows[:, None], lengths.shape[1], axis=1)
        heights[self.drafting] += lengths
        return heights

    def longest_padded(self, first: Indices, last: Indices) -> Floats:
        """Returns the padded cells of the longest sequence of each interval from column `first` to column `last`."""
        bounds = np.stack((first, last + 1), axis=1).ravel()
        # The appended number gives the end of the last column an index.
        most: Floats = np.maximum.reduceat(np.append(self.padded, 0.0), bounds)[::2]
        return most


class Strips(NamedTuple):
    """The passes of alternative steps, as arrays over strips. A strip is one pass, or several if it exceeds `ubatch`
    rows."""

    step: Indices
    """Index of the step."""
    sequences: Indices
    """Number of sequences."""
    rows: Indices
    """Rows of each sequence."""
    first: Indices
    """Index of the first column."""
    last: Indices
    """Index of the last column."""


def strips(columns: Columns, heights: StepMatrix) -> Strips:
    """Returns the strips of the steps in which the sequences of each column have `heights` rows.

    A pass takes all rows that its sequences have in common. So each strip is an interval of columns. Its rows are the
    smallest height in the interval, minus the larger of the heights of the two columns next to the interval.
    """
    count, steps = heights.shape
    firsts, lasts = _intervals(count)
    bordered = np.zeros((count + 2, steps), np.int16)
    bordered[1:-1] = heights
    rows = np.empty((len(firsts), steps), np.int16)
    low, end = heights, 0
    for width in range(1, count + 1):
        part = rows[end : end + len(low)]
        np.maximum(bordered[: len(low)], bordered[width + 1 :], out=part)
        np.subtract(low, part, out=part)
        end += len(low)
        low = np.minimum(low[:-1], heights[width:])
    flat = rows.ravel()
    found = np.flatnonzero(flat > 0)
    interval, step = np.divmod(found, steps)
    first, last = firsts[interval], lasts[interval]
    before = np.concatenate(((0,), np.cumsum(columns.sequences)))
    return Strips(step, before[last + 1] - before[first], flat[found].astype(np.intp), first, last)


@lru_cache(64)
def _intervals(count: int) -> tuple[Indices, Indices]:
    """Returns the first and the last column of each interval of `count` columns, by width, as read-only arrays."""
    widths = range(1, count + 1)
    firsts = np.concatenate([np.arange(count - width + 1) for width in widths])
    lasts = np.concatenate([np.arange(width - 1, count) for width in widths])
    return firsts, lasts
