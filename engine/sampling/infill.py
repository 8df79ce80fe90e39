"""The infill stage: merges candidates that begin alike, and ends a fill-in-the-middle early, as in llama.cpp."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.sampling.candidates import Candidates, Row
from engine.sampling.temperature import softmax
from engine.sampling.truncate import top_k
from engine.text import TokenBytes

# Most likely candidates that are merged: the time is quadratic in their number. The others are dropped.
_MAX_CANDIDATES = 256
# Minimum probability of a merged candidate that is no end token.
_MIN_SHARE = 0.2


def infill(found: Candidates, row: Row, ends: NDArray[np.intp], token_bytes: TokenBytes) -> Candidates:
    """Returns only the end tokens if they are likely, else the end tokens and the likely merged tokens.

    Tokens that begin with the bytes of another candidate are merged with it into the more likely of both. If no merged
    token is likely, the result is the most likely end token of `row`, or the most likely candidate if all end tokens
    are banned.
    """
    found = found.select(top_k(found.logits, _MAX_CANDIDATES))
    is_end = np.isin(found.ids, ends)
    probabilities = softmax(found.logits)
    end_share = float(probabilities[is_end].sum())
    if 3.0 * end_share * len(found.ids) > 1.0 - end_share:
        return found.select(is_end)
    _merge(probabilities, [token_bytes(token) for token in found.ids.tolist()])
    is_end &= probabilities > 0.0
    likely = (probabilities >= _MIN_SHARE) & ~is_end
    if not likely.any():
        return _end_token(row, ends) or found.select(slice(1))
    probabilities /= probabilities[likely | is_end].sum()
    likely &= probabilities >= 1.0 / (np.count_nonzero(likely) + 1)
    return found.select(likely | is_end)


def _end_token(row: Row, ends: NDArray[np.intp]) -> Candidates | None:
    """Returns the most likely of the end tokens; None if all are banned."""
    if not len(ends) or row[ends].max() == -np.inf:
        return None
    return Candidates(ends[row[ends].argmax()][None], np.zeros(1))


def _merge(probabilities: NDArray[np.float64], texts: list[bytes]) -> None:
    """Merges each pair of tokens of which one begins with the other: the more likely one gets both probabilities, the
    other one 0."""
    for first, start in enumerate(texts):
        for second, text in enumerate(texts):
            if probabilities[first] == 0.0:
                break
            if not start or first == second or probabilities[second] == 0.0 or not text.startswith(start):
                continue
            target, source = (second, first) if probabilities[second] > probabilities[first] else (first, second)
            probabilities[target] += probabilities[source]
            probabilities[source] = 0.0
