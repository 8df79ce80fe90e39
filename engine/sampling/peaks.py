"""The two highest logits of each row of a step, found for all rows at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.backend import Logits
from engine.sampling.candidates import Row


class Peak(NamedTuple):
    """The two highest logits of one row."""

    token: int
    """The token with the highest logit, the lowest id of several."""
    highest: float
    """The highest logit; NaN if the row contains NaN."""
    second: float
    """The highest logit of all other tokens; -inf if there is no other token."""


def row_peak(row: Row) -> Peak:
    """Returns the peak of one row. Does not change the row."""
    token = int(row.argmax())
    highest = float(row[token])
    if 0 < token < len(row) - 1:
        before, _, after = np.maximum.reduceat(row, (0, token, token + 1)).tolist()
        return Peak(token, highest, max(before, after))
    others = row[:token].max(initial=-np.inf), row[token + 1 :].max(initial=-np.inf)
    return Peak(token, highest, float(max(others)))


def row_peaks(rows: Logits) -> list[Peak]:
    """Returns the peak of each of `rows`, [rows, vocabulary]. The rows are changed during the call only."""
    numbers, tokens = np.arange(len(rows)), rows.argmax(axis=1)
    highest = rows[numbers, tokens]
    rows[numbers, tokens] = -np.inf
    second = rows.max(axis=1)
    rows[numbers, tokens] = highest
    return list(map(Peak, tokens.tolist(), highest.tolist(), second.tolist()))
