"""From the logits of the whole vocabulary to the few tokens that may be picked, without a full sort.

Of equal logits the lowest token id comes first, everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Logits of one position, [vocabulary].
Row: TypeAlias = NDArray[np.float32]

# A reach that excludes only banned tokens (-inf).
_UNLIMITED_REACH = 1e30


class BadLogits(ValueError):
    """No token can be picked from a row: it has NaN, or its maximum is infinite because of a fault or of bans."""


class Candidates(NamedTuple):
    """Tokens that may be picked, with their logits as float64."""

    ids: NDArray[np.intp]
    logits: NDArray[np.float64]
    mass: float | None = None
    """The sum of exp(logit - maximum) over more tokens than these, relative to which probabilities are computed.
    None means the sum over these tokens."""

    def only(self, kept: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Returns the candidates that indices, a mask or a slice select. Their mass is their own."""
        return Candidates(self.ids[kept], self.logits[kept])


def argmax_token(row: Row) -> int:
    """Returns the most likely token of a row. Raises BadLogits."""
    token = int(row.argmax())
    _checked(row[token])
    return token


def candidates_within(row: Row, reach: float) -> Candidates:
    """Returns the tokens with logits at most `reach` below the maximum, ordered by id. Raises BadLogits."""
    ids = (row >= _below(_checked(row.max()), reach)).nonzero()[0]
    return _candidates(row, ids)


def top_candidates(row: Row, k: int, reach: float = _UNLIMITED_REACH) -> Candidates:
    """Returns the `k` most likely of the tokens at most `reach` below the maximum, most likely first. Raises BadLogits.

    The row is viewed as a matrix of `width` columns. The k-th largest of the column maxima is a lower bound of the k-th
    largest logit: only columns with a maximum of at least this floor are searched, and only logits of at least this
    floor are sorted.
    """
    width = _width(len(row), k)
    maxima = _column_maxima(row, width)
    floor = _below(_checked(maxima.max()), reach)
    if k < width:
        floor = max(floor, float(np.partition(maxima, -k)[-k]))
    columns = (maxima >= floor).nonzero()[0]
    ids = (np.arange(0, len(row), width)[:, None] + columns).ravel()
    ids = ids[: ids.searchsorted(len(row))]
    found = _candidates(row, ids[(row[ids] >= floor).nonzero()[0]])
    return found.only((-found.logits).argsort(kind="stable")[:k])


def nucleus_candidates(row: Row, share: float, reach: float) -> Candidates:
    """Returns the most likely tokens, most likely first, at most `reach` below the maximum.

    There are at least as many as hold `share` of the mass of the whole row together, unless `reach` excludes some. The
    result's `mass` is that of the whole row. Raises BadLogits.
    """
    peak, mass = peak_and_mass(row)
    k = 256
    while True:
        found = top_candidates(row, k, reach)
        held = float(np.exp(found.logits - peak).sum())
        if held >= share * mass or len(found.ids) < k:
            return found._replace(mass=mass)
        k *= 8


def peak_and_mass(row: Row) -> tuple[float, float]:
    """Returns the maximum of a row, and the sum of exp(logit - maximum) with a relative error of at most 2e-6.

    Pairwise summation in float32 is precise enough for all but the maximum itself. The maximum's 1 is added in float64,
    so that the rest is not lost when one token is almost certain. Raises BadLogits.
    """
    token = argmax_token(row)
    weights = row - row[token]
    np.exp(weights, out=weights)
    weights[token] = 0.0
    return float(row[token]), 1.0 + float(weights.sum())


def _checked(peak: np.float32) -> float:
    if not math.isfinite(peak):
        raise BadLogits(f"the maximum of a row of logits is {peak}")
    return float(peak)


def _below(peak: float, reach: float) -> float:
    """Returns `peak - reach`, lowered so that rounding it to float32 excludes nothing."""
    return peak - reach - (abs(peak) + reach) * 2.0**-23


def _width(vocabulary: int, k: int) -> int:
    """Returns a number of columns so large that few columns hold two of the top k, or `vocabulary`: a single line."""
    width = max(2048, 32 * k)
    return width if 2 * width <= vocabulary else vocabulary


def _column_maxima(row: Row, width: int) -> Row:
    """Returns the maxima, [width], of the columns of a row as a matrix whose last line may be incomplete."""
    whole = len(row) // width * width
    maxima: Row = np.maximum.reduce(row[:whole].reshape(-1, width), axis=0)
    rest = row[whole:]
    np.maximum(maxima[: len(rest)], rest, out=maxima[: len(rest)])
    return maxima


def _candidates(row: Row, ids: NDArray[np.intp]) -> Candidates:
    return Candidates(ids, row[ids].astype(np.float64))
