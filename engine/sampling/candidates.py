"""Selects the tokens that may be picked from the logits of the whole vocabulary, without a full sort.

Among tokens with equal logits, the lowest id comes first in all functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.sampling.row_maxima import RowMaxima

# Logits of one position, [vocabulary].
Row: TypeAlias = NDArray[np.float32]

_Logits = TypeVar("_Logits", float, NDArray[np.float64])

# Distance below the maximum that excludes only banned tokens, whose logit is -inf.
UNLIMITED_REACH = 1e30


class BadLogits(ValueError):
    """No token can be picked from a row: it contains NaN, or its maximum is infinite, as after a fault or if all tokens
    are banned."""


class Candidates(NamedTuple):
    """Tokens that may be picked, with their logits."""

    ids: NDArray[np.intp]
    logits: NDArray[np.float64]
    mass: float | None = None
    """Sum of exp(logit - maximum) to which probabilities are relative, if it includes tokens that are not candidates.
    None means the sum over the candidates."""
    probabilities: NDArray[np.float64] | None = None
    """Probabilities before adaptive-p replaced the logits. None means the softmax of `logits`."""

    def select(self, kept: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Returns the candidates at `kept`: indices, a mask or a slice. Their `mass` is None."""
        return Candidates(self.ids[kept], self.logits[kept])


def argmax_token(row: Row) -> int:
    """Returns the most likely token of a row. Raises BadLogits."""
    token = int(row.argmax())
    _require_finite(row[token])
    return token


def candidates_within(row: Row, reach: float) -> Candidates:
    """Returns the tokens with logits at most `reach` below the maximum, ordered by id. Raises BadLogits."""
    ids = (row >= lowest_within(_require_finite(row.max()), reach)).nonzero()[0]
    return _candidates(row, ids)


def top_candidates(row: Row, k: int, reach: float = UNLIMITED_REACH) -> Candidates:
    """Returns the `k` most likely of the tokens at most `reach` below the maximum, most likely first. Raises
    BadLogits."""
    return _top_of_row(RowMaxima(row[None]), k, reach)


def _top_of_row(maxima: RowMaxima, k: int, reach: float) -> Candidates:
    row, highest = maxima.logits[0], _require_finite(maxima.columns[0].max())
    lowest = max(lowest_within(highest, reach), maxima.bound(0, k))
    found = _candidates(row, (row >= lowest).nonzero()[0])
    return found.select((-found.logits).argsort(kind="stable")[:k])


def nucleus_candidates(row: Row, share: float, reach: float) -> Candidates:
    """Returns the most likely tokens at most `reach` below the maximum, most likely first.

    Together they hold at least `share` of the mass of the whole row, unless `reach` excludes too many tokens. `mass` of
    the result is that of the whole row. Raises BadLogits.
    """
    peak, mass = peak_and_mass(row)
    maxima, k = RowMaxima(row[None]), 256
    while True:
        found = _top_of_row(maxima, k, reach)
        held = float(np.exp(found.logits - peak).sum())
        if held >= share * mass or len(found.ids) < k:
            return found._replace(mass=mass)
        k *= 8


def peak_and_mass(row: Row) -> tuple[float, float]:
    """Returns the maximum of a row, and the sum of exp(logit - maximum) with a relative error of at most 2e-6.

    The terms are summed pairwise in float32, except the 1 of the maximum, which is added in float64. The other terms
    are then not lost if one token is almost certain. Raises BadLogits.
    """
    token = argmax_token(row)
    weights = row - row[token]
    np.exp(weights, out=weights)
    weights[token] = 0.0
    return float(row[token]), 1.0 + float(weights.sum())


def _require_finite(peak: float | np.float32) -> float:
    if not math.isfinite(peak):
        raise BadLogits(f"the maximum of a row of logits is {peak}")
    return float(peak)


def lowest_within(peak: _Logits, reach: _Logits) -> _Logits:
    """Returns `peak - reach`, lowered by the rounding error of float32, so that no token is excluded wrongly."""
    return peak - reach - (abs(peak) + reach) * 2.0**-23


def _candidates(row: Row, ids: NDArray[np.intp]) -> Candidates:
    return Candidates(ids, row[ids].astype(np.float64))
