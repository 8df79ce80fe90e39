"""Passes over the weights that one decode takes, and the cells that its rows attend to. Pure functions of counts.

llama.cpp splits a batch into passes (`llama-batch.cpp`). With unified KV a pass takes the next `ubatch` rows
(`split_simple`). With per-slot KV a pass takes sequences whose ids are consecutive, each with the same number of rows
(`split_equal`, sequential). Rows are given in ascending order of their sequence ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import Context

# `llama_kv_cache::get_n_kv` rounds the cells of a pass up to a multiple of this.
PADDED_CELLS = 256

StepMatrix = NDArray[np.int16]
"""A number of rows or tokens for each column, or draft, of each of several alternative steps: [columns, steps]."""
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class SequenceRows(NamedTuple):
    """Rows of one sequence in a step, and the cells that the sequence has before the step."""

    seq: int
    rows: int = 1
    cells: int = 0


class Pass(NamedTuple):
    """One pass: `rows` rows of each of `sequences` sequences, from the one at index `first` on.

    With unified KV a pass ignores sequences; all of its rows are counted as those of one sequence at index 0.
    """

    first: int
    sequences: int
    rows: int

    @property
    def total(self) -> int:
        """Rows of all its sequences."""
        return self.sequences * self.rows


class StepShape(NamedTuple):
    """The properties of a step that its cost depends on."""

    passes: tuple[int, ...] = ()
    """Rows of each pass."""
    attended: int = 0
    """Pairs of a row and a cell for which attention is computed."""

    @property
    def rows(self) -> int:
        """Rows of all passes."""
        return sum(self.passes)


class Layout(NamedTuple):
    """The properties of a context that passes and attention depend on."""

    unified: bool = True
    ubatch: int = 512
    flash: bool = False
    """True if attention skips the cells of a pass that a row does not attend to."""

    @classmethod
    def of(cls, context: Context) -> Layout:
        """Returns the layout of `context`."""
        return cls(context.unified, context.ubatch, context.flash)

    def passes(self, rows: Sequence[SequenceRows]) -> tuple[Pass, ...]:
        """Returns the passes of a step of `rows`; see the function `passes`."""
        return passes(rows, self.unified, self.ubatch)

    def shape(self, rows: Sequence[SequenceRows], resident: int = 0) -> StepShape:
        """Returns the shape of a step of `rows` while `resident` cells of all sequences are in use."""
        found = self.passes(rows)
        return StepShape(tuple(each.total for each in found), attended(rows, found, self, resident))

    def even(self, sequences: int, cells: int = 0) -> StepShape:
        """Returns the shape of a decode of one row for each of `sequences`, which have `cells` cells together."""
        each = cells // max(1, sequences)
        return self.shape([SequenceRows(seq, 1, each) for seq in range(sequences)], cells)


def passes(rows: Sequence[SequenceRows], unified: bool, ubatch: int) -> tuple[Pass, ...]:
    """Returns the passes in the order in which llama.cpp computes them."""
    if unified:
        full, rest = divmod(sum(part.rows for part in rows), ubatch)
        return (Pass(0, 1, ubatch),) * full + ((Pass(0, 1, rest),) if rest else ())
    ids, left = [part.seq for part in rows], [part.rows for part in rows]
    found: list[Pass] = []
    first, count = 0, len(rows)
    while first < count:
        if not left[first]:
            first += 1
            continue
        # `split_equal` stops only after it has taken one sequence more than `ubatch`.
        end, limit = first + 1, min(count, first + ubatch + 1)
        while end < limit and left[end] and ids[end] == ids[end - 1] + 1:
            end += 1
        part = left[first:end]
        each = min(min(part), max(1, ubatch // len(part)))
        left[first:end] = [rows - each for rows in part]
        found.append(Pass(first, end - first, each))
    return tuple(found)


def attended(rows: Sequence[SequenceRows], found: Sequence[Pass], layout: Layout, resident: int = 0) -> int:
    """Returns the pairs of a row and a cell for which attention is computed in the passes `found` of `rows`.

    With unified KV a row attends to all `resident` cells, with per-slot KV and flash attention to its sequence's.
    Without flash attention every row of a pass costs as much as one of the longest sequence in the pass. The rows of
    the step themselves count as one cell at most.
    """
    if layout.unified:
        return resident * sum(part.rows for part in rows)
    if layout.flash:
        return sum(part.rows * part.cells for part in rows)
    lengths = [padded(part.cells) for part in rows]
    return sum(each.total * max(lengths[each.first : each.first + each.sequences]) for each in found)


def segments(rows: Sequence[SequenceRows], pass_cells: float) -> list[int]:
    """Returns where to cut `rows`, in ascending order of ids, into passes that are cheapest together: the index after
    each segment, the last of them `len(rows)`.

    Without flash attention a row costs as much as the longest sequence of its pass, so a long sequence between short
    ones is cheaper in a pass of its own. `pass_cells` is the cost of a pass in pairs of a row and a cell. Optimal, by
    dynamic programming over the cuts (as Bellman 1961 fits curves by segments), for segments of consecutive ids.
    """
    lengths, count = [padded(part.cells) for part in rows], len(rows)
    if count < 2 or sum((max(lengths) - own) * part.rows for own, part in zip(lengths, rows, strict=True)) < pass_cells:
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
    """Returns the cells that a row of a sequence with `cells` cells costs without flash attention."""
    return (cells // PADDED_CELLS + 1) * PADDED_CELLS


# ── many alternative steps at once ──


class Columns(NamedTuple):
    """Sequences side by side in the order of their ids, as arrays over columns.

    Sequences without drafts that have consecutive ids and equal numbers of rows share a column. A gap between ids is a
    column without rows.
    """

    rows: StepMatrix
    """Rows of each sequence of the column, [columns]."""
    sequences: Indices
    cells: Floats
    """Cells of all sequences of the column together."""
    padded: Floats
    """Padded cells of the longest sequence of the column."""
    drafting: Indices
    """The columns of the sequences that get drafts, in the order of the ids that `of` was given."""

    @classmethod
    def of(cls, rows: Sequence[SequenceRows], drafting: Collection[int]) -> Columns:
        """Returns the columns of `rows`, where the sequences with the ids `drafting` have a column each."""
        made: list[list[int]] = []
        where, after = dict[int, int](), -1
        for seq, count, cells in rows:
            if made and seq != after:
                made.append([0, 0, 0, 0])
            if seq in drafting:
                where[seq] = len(made)
            elif made and seq - 1 not in where and made[-1][0] == count:
                last = made[-1]
                last[1:] = last[1] + 1, last[2] + cells, max(last[3], padded(cells))
                after = seq + 1
                continue
            made.append([count, 1, cells, padded(cells)])
            after = seq + 1
        table = np.array(made, np.int64).reshape(len(made), 4)
        return cls(
            table[:, 0].astype(np.int16),
            table[:, 1].astype(np.intp),
            table[:, 2].astype(np.float64),
            table[:, 3].astype(np.float64),
            np.array([where[seq] for seq in drafting], np.intp),
        )

    @property
    def intervals(self) -> int:
        """Number of intervals of columns."""
        return len(self.rows) * (len(self.rows) + 1) // 2

    def heights(self, lengths: StepMatrix) -> StepMatrix:
        """Returns the rows by column and step if draft i has `lengths[i, k]` tokens in step k."""
        heights = np.repeat(self.rows[:, None], lengths.shape[1], axis=1)
        heights[self.drafting] += lengths
        return heights


class Strips(NamedTuple):
    """The passes of several alternative steps, as arrays: one strip is one pass unless it exceeds `ubatch` rows."""

    step: Indices
    sequences: Indices
    rows: Indices
    """Rows of each sequence."""
    padded: Floats
    """Padded cells of the longest sequence."""


def strips(columns: Columns, heights: StepMatrix) -> Strips:
    """Returns the strips of the steps whose columns have `heights` rows.

    A pass takes all rows that its sequences have in common. So each strip is a maximal interval of columns: its rows
    are the smallest height in the interval, less the larger of the two heights beside the interval.
    """
    count, steps = heights.shape
    firsts, lasts = _intervals(count)
    beside = np.zeros((count + 2, steps), np.int16)
    beside[1:-1] = heights
    rows = np.empty((len(firsts), steps), np.int16)
    low, end = heights.copy(), 0
    for width in range(1, count + 1):
        if width > 1:
            low = low[:-1]
            np.minimum(low, heights[width - 1 :], out=low)
        part = rows[end : end + len(low)]
        np.maximum(beside[: len(low)], beside[width + 1 :], out=part)
        np.subtract(low, part, out=part)
        end += len(low)
    flat = rows.ravel()
    found = np.flatnonzero(flat > 0)
    interval, step = np.divmod(found, steps)
    first, last = firsts[interval], lasts[interval]
    before = np.concatenate(((0,), np.cumsum(columns.sequences)))
    longest = np.maximum.accumulate(np.where(_upper(count), columns.padded, 0.0), axis=1)
    return Strips(step, before[last + 1] - before[first], flat[found].astype(np.intp), longest[first, last])


@lru_cache(64)
def _intervals(count: int) -> tuple[Indices, Indices]:
    """Returns the first and the last columns of all intervals of `count` columns, narrow ones first. Read-only."""
    widths = range(1, count + 1)
    firsts = np.concatenate([np.arange(count - width + 1) for width in widths])
    lasts = np.concatenate([np.arange(width - 1, count) for width in widths])
    return firsts, lasts


@lru_cache(64)
def _upper(count: int) -> NDArray[np.bool_]:
    """Returns a square matrix that is true on and above the diagonal. Read-only."""
    return np.triu(np.ones((count, count), bool))
