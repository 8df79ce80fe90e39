"""The rows of one decode, as arrays in the native library's layout."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class AlternativeRow(NamedTuple):
    """Row `row` computes a second token at a position of its sequence.

    It attends to the cells of the sequence, and to the rows from `first` up to `end`, which are those before its
    position. No other row attends to it.
    """

    row: int
    first: int
    end: int


class Batch:
    """Up to `capacity` rows, added sequence by sequence. One batch is reused for every step.

    Row i computes `token[i]` at position `pos[i]` of sequence `seq[i]`, with a row of logits if `output[i]` is 1.
    Rows of logits have the order of their rows in the batch. `alternatives` are the rows at positions that their
    sequences have twice.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        table: NDArray[np.int32] = np.zeros((3, capacity), np.int32)
        self.token, self.pos, self.seq = table
        self.output: NDArray[np.int8] = np.zeros(capacity, np.int8)
        self._bits = table.view(np.uint32)
        # Memoryviews, into which an `array` is copied without a call of numpy.
        self._columns = [column.data for column in (self.token, self.pos, self.seq, self.output)]
        self._positions: NDArray[np.int32] = np.arange(1, dtype=np.int32)
        self.rows = 0
        self.outputs = 0
        self.alternatives: list[AlternativeRow] = []

    def clear(self) -> None:
        """Removes all rows."""
        self.rows = self.outputs = 0
        self.alternatives.clear()

    def add(self, seq: int, start: int, tokens: Sequence[int] | array[int], outputs: int) -> int:
        """Adds a row for each of `tokens` at positions from `start` on; the last `outputs` of the rows have logits.

        Returns the index, among all rows of logits, of the first one added.
        """
        first, count = self.rows, len(tokens)
        assert count, "each sequence has at least one row"
        assert outputs <= count, "each row of logits belongs to a row"
        assert first + count <= self.capacity, "the plan exceeds the batch"
        end = first + count
        if count == 1:
            self.token[first], self.pos[first], self.seq[first] = tokens[0], start, seq
            self.output[first] = outputs
        else:
            self.token[first:end] = tokens
            self.pos[first:end] = self._range(start, count)
            self.seq[first:end] = seq
            self.output[first : end - outputs] = 0
            self.output[end - outputs : end] = 1
        row, self.rows, self.outputs = self.outputs, end, self.outputs + outputs
        return row

    def fill(self, parts: Sequence[tuple[int, int, int]], tokens: array[int], outputs: Sequence[int]) -> None:
        """Replaces all rows. `parts` has, for each sequence, its id, its number of rows and the position of the first
        one; `tokens` are those of all rows, and the last `outputs[i]` rows of sequence i have logits."""
        rows, (seqs, counts, starts) = len(tokens), zip(*parts, strict=True)
        assert rows <= self.capacity, "the plan exceeds the batch"
        self.alternatives.clear()
        token, pos, seq, output = self._columns
        token[:rows] = tokens
        if rows == len(parts):
            seq[:rows], pos[:rows], output[:rows] = array("i", seqs), array("i", starts), array("b", outputs)
        else:
            ends, numbers = np.cumsum(counts), self._range(0, rows)
            self.seq[:rows] = np.repeat(seqs, counts)
            self.pos[:rows] = np.repeat(starts - ends + counts, counts) + numbers
            self.output[:rows] = numbers >= np.repeat(ends - outputs, counts)
        self.rows, self.outputs = rows, sum(outputs)

    def make_alternative(self, row: int, pos: int, first: int) -> None:
        """Makes `row`, the last one of a sequence whose rows begin at row `first`, a second token at position `pos`."""
        end = first + pos - int(self.pos[first])
        assert first < end < row < self.rows, "the sequence has another row at that position"
        self.pos[row] = pos
        self.alternatives.append(AlternativeRow(row, first, end))

    @property
    def highest(self) -> list[int]:
        """The highest token id, position and sequence id of all rows, as unsigned numbers, of which a negative number
        is higher than any other."""
        found: list[int] = np.maximum.reduce(self._bits[:, : self.rows], axis=1).tolist()
        return found

    def _range(self, start: int, count: int) -> NDArray[np.int32]:
        if start + count > len(self._positions):
            self._positions = np.arange(2 * (start + count), dtype=np.int32)
        return self._positions[start : start + count]
