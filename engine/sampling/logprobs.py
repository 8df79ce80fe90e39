"""Log probabilities of a row: of its raw logits, before bias, penalties and truncation, or of its candidates."""

from __future__ import annotations

import math

import numpy as np

from engine.contract import Logprob
from engine.sampling.candidates import Candidates, Row, peak_and_mass, top_candidates


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


def candidate_logprob(found: Candidates, token: int, count: int) -> Logprob:
    """Returns the log-softmax over the candidates of `token` and of the `count` most likely candidates.

    The value of a token that is no candidate is -inf, as after a forced token. Candidates whose probability is below
    the smallest float64 are left out.
    """
    scores = found.logits - found.logits.max()
    values = scores - math.log(np.exp(scores).sum())
    best = (-values).argsort(kind="stable")[:count]
    best = best[np.exp(values[best]) > 0.0]
    own = values[found.ids == token]
    top = tuple(zip(found.ids[best].tolist(), values[best].tolist(), strict=True))
    return Logprob(token, float(own[0]) if len(own) else -math.inf, top)
