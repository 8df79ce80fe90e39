"""The rows of one decode, as arrays that the native library reads in place."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Batch:
    """Up to `capacity` rows, filled sequence by sequence and reused for every step.

    Row i feeds `token[i]` at position `pos[i]` of sequence `seq[i]`, and yields a row of logits if `output[i]`.
    Rows of logits come back in the order of the rows that asked for them.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.token: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.pos: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.seq: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.output: NDArray[np.int8] = np.zeros(capacity, np.int8)
        self._positions: NDArray[np.int32] = np.arange(1, dtype=np.int32)
        self.rows = 0
        self.outputs = 0

    def clear(self) -> None:
        """No rows."""
        self.rows = self.outputs = 0

    def add(self, seq: int, start: int, tokens: Sequence[int] | array[int], outputs: int) -> int:
        """Adds `tokens` at positions from `start`, the last `outputs` of them with logits.

        Returns the index of the first of those rows of logits.
        """
        first, count = self.rows, len(tokens)
        assert count, "a sequence takes part with at least one row"
        assert outputs <= count, "no more rows of logits than rows"
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

    def _range(self, start: int, count: int) -> NDArray[np.int32]:
        if start + count > len(self._positions):
            self._positions = np.arange(2 * (start + count), dtype=np.int32)
        return self._positions[start : start + count]
