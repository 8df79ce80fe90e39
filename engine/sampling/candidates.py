"""From a row of logits over the whole vocabulary to the few tokens that may be picked, without sorting it all.

Of equal logits the lowest token id comes first, everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
"""Logits of one position, [vocabulary]."""
EVERYTHING = 1e30
"""A reach that leaves out nothing but what is banned (-inf)."""


class BadLogits(ValueError):
    """Nothing can be picked from a row: it holds NaN, or its maximum is infinite because of a fault or of bans."""


class Candidates(NamedTuple):
    """Tokens that may be picked, with their logits as float64."""

    ids: NDArray[np.intp]
    logits: NDArray[np.float64]
    mass: float | None = None
    """The sum of exp(logit - maximum) that shares refer to, when that is more than these tokens have."""

    def only(self, kept: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Those that indices, a mask or a slice select; shares refer to them alone from here on."""
        return Candidates(self.ids[kept], self.logits[kept])


def likeliest(row: Row) -> int:
    """The argmax of a row."""
    token = int(row.argmax())
    _checked(row[token])
    return token


def within(row: Row, reach: float) -> Candidates:
    """The tokens at most `reach` below the maximum, by id."""
    ids = (row >= _below(_checked(row.max()), reach)).nonzero()[0]
    return _listed(row, ids)


def top(row: Row, k: int, reach: float = EVERYTHING) -> Candidates:
    """The `k` likeliest of the tokens at most `reach` below the maximum, likeliest first.

    The row is seen as lines of `width`. Of the maxima of its columns, k are at least as large as the k-th of them,
    so k logits are: only what reaches that floor is sorted, and only columns whose maximum does can hold it.
    """
    width = _width(len(row), k)
    heads = _column_maxima(row, width)
    floor = _below(_checked(heads.max()), reach)
    if k < width:
        floor = max(floor, float(np.partition(heads, -k)[-k]))
    columns = (heads >= floor).nonzero()[0]
    ids = (np.arange(0, len(row), width)[:, None] + columns).ravel()
    ids = ids[: ids.searchsorted(len(row))]
    found = _listed(row, ids[(row[ids] >= floor).nonzero()[0]])
    return found.only((-found.logits).argsort(kind="stable")[:k])


def nucleus(row: Row, share: float, reach: float) -> Candidates:
    """The likeliest tokens, likeliest first, at most `reach` below the maximum: at least as many of them as
    together hold `share` of the mass of the whole row, which is kept as their mass."""
    peak, mass = spread(row)
    k = 256
    while True:
        found = top(row, k, reach)
        held = float(np.exp(found.logits - peak).sum())
        if held >= share * mass or len(found.ids) < k:
            return found._replace(mass=mass)
        k *= 8


def spread(row: Row) -> tuple[float, float]:
    """The maximum of a row, and the sum of exp(logit - maximum) with a relative error of 2e-6 at most.

    Pairwise summation in float32 does that for all but the maximum itself, whose 1 is added in float64 so that
    it does not swallow the rest when a token is almost certain.
    """
    token = likeliest(row)
    weights = row - row[token]
    np.exp(weights, out=weights)
    weights[token] = 0.0
    return float(row[token]), 1.0 + float(weights.sum())


def _checked(peak: np.float32) -> float:
    if not math.isfinite(peak):
        raise BadLogits(f"the maximum of a row of logits is {peak}")
    return float(peak)


def _below(peak: float, reach: float) -> float:
    """`peak - reach`, and so little less that rounding it to float32 excludes nothing."""
    return peak - reach - (abs(peak) + reach) * 2.0**-23


def _width(vocabulary: int, k: int) -> int:
    """Of lines so long that few columns hold two of the top k, or of a single line."""
    width = max(2048, 32 * k)
    return width if 2 * width <= vocabulary else vocabulary


def _column_maxima(row: Row, width: int) -> Row:
    """Of the lines of a row, the last of which may be shorter; [width]."""
    whole = len(row) // width * width
    heads: Row = np.maximum.reduce(row[:whole].reshape(-1, width), axis=0)
    rest = row[whole:]
    np.maximum(heads[: len(rest)], rest, out=heads[: len(rest)])
    return heads


def _listed(row: Row, ids: NDArray[np.intp]) -> Candidates:
    return Candidates(ids, row[ids].astype(np.float64))
