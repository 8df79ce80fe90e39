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

    def only(self, kept: NDArray[np.intp] | NDArray[np.bool_]) -> Candidates:
        """Those that an array of indices or a mask selects; shares refer to them alone from here on."""
        return Candidates(self.ids[kept], self.logits[kept])


def likeliest(row: Row) -> int:
    """The argmax of a row."""
    token = int(row.argmax())
    _checked(row[token])
    return token


def within(row: Row, reach: float) -> Candidates:
    """The tokens at most `reach` below the maximum, by id."""
    return _at_least(row, _below(_checked(row.max()), reach))


def top(row: Row, k: int, reach: float = EVERYTHING) -> Candidates:
    """The `k` likeliest of the tokens at most `reach` below the maximum, likeliest first."""
    heads = _heads(row, k)
    floor = _below(_checked(heads.max()), reach)
    if k < len(heads):
        floor = max(floor, np.partition(heads, -k)[-k])
    found = _at_least(row, floor)
    return found.only(np.argsort(-found.logits, kind="stable")[:k])


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


def _checked(peak: np.float32) -> np.float32:
    if not math.isfinite(peak):
        raise BadLogits(f"the maximum of a row of logits is {peak}")
    return peak


def _below(peak: np.float32, reach: float) -> np.float32:
    """The least logit that is within `reach`, or the float32 below it."""
    return np.nextafter(np.float32(float(peak) - reach), np.float32(-np.inf))


def _heads(row: Row, k: int) -> Row:
    """The maxima of disjoint groups that cover a row, so that the k-th of them is a floor that k logits reach.

    With sixteen groups for each of the k, few logits but those of the top k reach it.
    """
    width = max(1024, 16 * k)
    lines = len(row) // width
    if lines < 2:
        return row
    heads = np.maximum.reduce(row[: lines * width].reshape(lines, width), axis=0)
    rest = row[lines * width :]
    np.maximum(heads[: len(rest)], rest, out=heads[: len(rest)])
    return heads


def _at_least(row: Row, floor: np.float32) -> Candidates:
    ids = (row >= floor).nonzero()[0]
    return Candidates(ids, row[ids].astype(np.float64))
