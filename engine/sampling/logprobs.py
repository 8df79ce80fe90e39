"""Log probabilities of the raw logits of a row, before bias, penalties and truncation."""

from __future__ import annotations

import math

from engine.contract import Logprob
from engine.sampling.candidates import Row, peak_and_mass, top_candidates


def logprob(row: Row, token: int, count: int) -> Logprob:
    """Returns the log-softmax of `token` and of the `count` most likely tokens, with an error of at most 1e-5.

    A value is 0.0 only if all other tokens together have a probability below 1e-16. Raises BadLogits.
    """
    peak, mass = peak_and_mass(row)
    normaliser = math.log(mass)
    if not count:
        return Logprob(token, float(row[token]) - peak - normaliser)
    found = top_candidates(row, count)
    values = (found.logits - peak - normaliser).tolist()
    return Logprob(token, float(row[token]) - peak - normaliser, tuple(zip(found.ids.tolist(), values, strict=True)))
