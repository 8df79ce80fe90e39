"""Log probabilities under the raw logits of a row, before bias, penalties and truncation."""

from __future__ import annotations

import math

from engine.contract import Logprob
from engine.sampling.candidates import Row, spread, top


def logprob(row: Row, token: int, count: int) -> Logprob:
    """The log-softmax of `token`, with an error of 1e-5 at most, and of the `count` likeliest tokens there.

    It is 0.0 only if the rest of the vocabulary holds less than 1e-16 of the mass. Raises BadLogits.
    """
    peak, mass = spread(row)
    normaliser = math.log(mass)
    if not count:
        return Logprob(token, float(row[token]) - peak - normaliser)
    found = top(row, count)
    values = (found.logits - peak - normaliser).tolist()
    return Logprob(token, float(row[token]) - peak - normaliser, tuple(zip(found.ids.tolist(), values, strict=True)))
