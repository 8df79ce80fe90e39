"""Stages that drop candidates: top_n_sigma, top_k, typical_p, top_p, min_p and XTC, as in llama.cpp.

Each stage gets the candidates that the previous stage kept, with renormalised probabilities. Each stage keeps at least
one candidate, and returns the kept ones as indices, a mask or a slice. Logits are float64, [candidates], finite and,
unless stated otherwise, in any order. A `keep` above 1 is the minimum number of kept candidates (`min_keep`).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_CandidateLogits: TypeAlias = NDArray[np.float64]
_Indices: TypeAlias = NDArray[np.intp]
_Mask: TypeAlias = NDArray[np.bool_]


def top_n_sigma(logits: NDArray[np.floating], n: float) -> float:
    """Top-n-sigma (Tang et al. 2024): returns the lowest logit that is kept, `n` standard deviations below the maximum.

    Logits of -inf count neither for the maximum nor for the deviation.
    """
    finite = logits[logits > -np.inf]
    return float(finite.max()) - n * float(finite.std(dtype=np.float64))


def top_k(logits: _CandidateLogits, k: int) -> _Indices:
    """Returns the indices of the `k` most likely candidates, most likely first."""
    ranked: _Indices = (-logits).argsort(kind="stable")[:k]
    return ranked


def typical_p(logits: _CandidateLogits, share: float, keep: int = 0) -> _Indices:
    """Locally typical sampling (Meister et al. 2022): keeps the fewest tokens that hold more than `share` of the mass
    together, beginning with those whose surprise is closest to the entropy. Returns their indices, most likely first.
    """
    peak = logits.max()
    surprise = peak + np.log(np.exp(logits - peak).sum()) - logits
    probabilities = np.exp(-surprise)
    deviation = np.abs(surprise - (probabilities * surprise).sum())
    kept = np.sort(_lowest(deviation, probabilities, share, keep))
    ranked: _Indices = kept[(-logits[kept]).argsort(kind="stable")]
    return ranked


def top_p(logits: _CandidateLogits, share: float, mass: float | None = None, keep: int = 0) -> slice:
    """Nucleus sampling (Holtzman et al. 2020): keeps the fewest first tokens that hold at least `share` of `mass`.

    `logits` are in descending order. `mass` is a sum of exp(logit - maximum); None means the sum over `logits`.
    """
    held = np.exp(logits - logits[0]).cumsum()
    return slice(max(int(held.searchsorted(share * (held[-1] if mass is None else mass))) + 1, keep))


def min_p(logits: _CandidateLogits, share: float, keep: int = 0) -> _Mask | _Indices:
    """Keeps the tokens whose probability is at least `share` times that of the most likely token."""
    kept: _Mask = logits >= logits.max() + math.log(share)
    return kept if np.count_nonzero(kept) >= keep else top_k(logits, keep)


def xtc(logits: _CandidateLogits, threshold: float, keep: int = 0) -> _Mask:
    """Exclude top choices (p-e-w 2024): drops the tokens with a probability of at least `threshold`, except the least
    likely of them. A threshold above 0.5 drops nothing.
    """
    weights = np.exp(logits - logits.max())
    above = (weights >= threshold * weights.sum()).nonzero()[0]
    kept = np.ones(len(logits), np.bool_)
    if threshold <= 0.5 and len(above) > 1 and len(logits) - len(above) + 1 >= keep:
        kept[above[(-logits[above]).argsort(kind="stable")[:-1]]] = False
    return kept


def _lowest(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float, keep: int) -> _Indices:
    """Returns the indices of the lowest scores, in ascending order of score: the fewest whose weights add up to more
    than `share`, and at least `keep`. Sorts at most eight times as many scores as necessary."""
    size = max(256, keep)
    while size < len(scores):
        near = (scores <= np.partition(scores, size)[size]).nonzero()[0]
        if weights[near].sum() > share:
            break
        size *= 8
    else:
        near = np.arange(len(scores))
    order: _Indices = near[scores[near].argsort(kind="stable")]
    held = weights[order].cumsum()
    return order[: max(int(held.searchsorted(share, side="right")) + 1, keep)]
