"""The maxima of each row's columns and the two highest logits of each row, from one pass over all logits of a step.

Each row is viewed as a matrix: its *column* c has the logits of the tokens c, c + width, c + 2 * width and so on. The
k-th largest column maximum is a lower bound of the k-th largest logit, so only few columns have to be searched for the
most likely tokens. Tokens after the last whole line of the matrix are columns of their own.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backend import Logits

_Tokens = NDArray[np.intp]

# Minimum, preferred and maximum number of columns. With more columns, selecting the largest maxima takes longer; with
# fewer, more columns contain two of the top tokens.
_MIN_WIDTH, _WIDTH, _MAX_WIDTH = 1024, 2048, 4096


class Peaks(NamedTuple):
    """The two highest logits of each row."""

    tokens: _Tokens
    """The most likely token; of several with the same logit, the lowest id."""
    highest: NDArray[np.float64]
    """The highest logit; NaN if the row contains NaN."""
    second: NDArray[np.float64]
    """The highest logit of all other tokens; -inf if there is no other token."""


class RowMaxima:
    """The rows of logits of one step, [rows, vocabulary], with the maxima of their columns."""

    def __init__(self, logits: Logits) -> None:
        self.logits = logits
        self.width = _width(logits.shape[1])
        """Number of tokens of a line."""

    @property
    def _lines(self) -> Logits:
        """The whole lines of the rows, [rows, lines, width]: a view."""
        rows, vocabulary = self.logits.shape
        lines = vocabulary // self.width
        return self.logits[:, : lines * self.width].reshape(rows, lines, self.width)

    @cached_property
    def columns(self) -> Logits:
        """The maxima of the columns of each row."""
        columns: Logits = np.maximum.reduce(self._lines, axis=1)
        if rest := self.logits.shape[1] % self.width:
            columns = np.hstack([columns, self.logits[:, -rest:]])
        return columns

    @cached_property
    def peaks(self) -> Peaks:
        """The peaks of the rows."""
        numbers = np.arange(len(self.logits))
        at = self.columns.argmax(axis=1)
        highest = self.columns[numbers, at]
        values = self.columns_at(numbers, at)
        line = values.argmax(axis=1)
        tokens: _Tokens = line * self.width + at
        values[numbers, line] = -np.inf
        self.columns[numbers, at] = values.max(axis=1)
        second = self.columns[numbers, self.columns.argmax(axis=1)]  # takes less time than `max`
        self.columns[numbers, at] = highest
        if (tied := (second == highest).nonzero()[0]).size:  # `argmax` prefers earlier columns, even with higher ids
            tokens[tied] = self.logits[tied].argmax(axis=1)
        return Peaks(tokens, highest.astype(np.float64), second.astype(np.float64))

    def bound(self, row: int, k: int) -> float:
        """Returns a lower bound of the k-th largest logit of a row: the k-th largest column maximum, or -inf if there
        are not more than `k` columns."""
        if k >= self.columns.shape[1]:
            return -np.inf
        ordered = self.columns[row].copy()
        ordered.partition(len(ordered) - k)  # the method takes a third less time than the function
        return float(ordered[len(ordered) - k])

    def columns_at(self, rows: _Tokens, columns: _Tokens) -> Logits:
        """Returns the logits of one column of each of `rows`, [rows, lines]. The column of a token after the last whole
        line has only this token, in the last line; its other logits are -inf."""
        if self.columns.shape[1] == self.width:
            return self._lines[rows, :, columns]
        values = self._lines[rows, :, np.minimum(columns, self.width - 1)]
        single = (columns >= self.width).nonzero()[0]
        values[single] = -np.inf
        values[single, -1] = self.columns[rows[single], columns[single]]
        return values


@lru_cache(8)
def _width(vocabulary: int) -> int:
    """Returns the number of columns: a divisor of `vocabulary` close to `_WIDTH`, so that all lines are whole, or else
    `_WIDTH`. A small vocabulary is one line."""
    if vocabulary < 2 * _WIDTH:
        return max(1, vocabulary)
    divisors = [width for width in range(_MIN_WIDTH, _MAX_WIDTH + 1) if vocabulary % width == 0]
    return min(divisors, key=lambda width: abs(width - _WIDTH), default=_WIDTH)
