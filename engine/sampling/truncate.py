"""Truncation of the candidates: top_k, typical_p, top_p, min_p and XTC, as llama.cpp's samplers define them.

The stages run in this order, on the distribution at temperature 1. Each stage gets the candidates that the previous
stage kept, with renormalised probabilities. Each stage keeps at least one candidate, and returns the kept ones as
indices, a mask or a slice. Logits are float64, [candidates], finite and, unless stated otherwise, in any order.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.contract import SamplingParams
from engine.sampling.candidates import Candidates, Row, candidates_within, nucleus_candidates, top_candidates
from engine.sampling.noise import NOISE_SPAN

_CandidateLogits: TypeAlias = NDArray[np.float64]
_Indices: TypeAlias = NDArray[np.intp]
_Mask: TypeAlias = NDArray[np.bool_]


def truncate(row: Row, params: SamplingParams, apply_xtc: bool) -> Candidates:
    """Returns the candidates of a row after all stages. Raises BadLogits."""
    found = _top_k(row, params, apply_xtc)
    if params.typical_p < 1.0:
        found = found.select(typical_p(found.logits, params.typical_p))
    if params.top_p < 1.0:
        found = found.select(top_p(found.logits, params.top_p, found.mass))
    if params.min_p > 0.0:
        found = found.select(min_p(found.logits, params.min_p))
    if apply_xtc:
        found = found.select(xtc(found.logits, params.xtc_threshold))
    return found


def _top_k(row: Row, params: SamplingParams, apply_xtc: bool) -> Candidates:
    """Applies top_k, and excludes tokens that cannot be picked and cannot affect a later stage.

    All tokens more than `NOISE_SPAN` below the maximum together hold less than 1e-12 of the mass at temperature 1.
    Tokens more than `NOISE_SPAN` * T below the maximum are never picked at temperature T. min_p depends only on the
    maximum, so it can be applied here.
    """
    temperature = params.temperature
    reach = NOISE_SPAN * max(temperature, 1.0)
    if params.top_k > 0:
        return top_candidates(row, params.top_k, reach)
    if params.typical_p < 1.0:
        return candidates_within(row, reach)
    min_p_reach = -math.log(params.min_p) if params.min_p > 0.0 else math.inf
    if params.top_p < 1.0:
        return nucleus_candidates(row, params.top_p, min(reach, min_p_reach))
    return candidates_within(row, min(reach if apply_xtc else NOISE_SPAN * temperature, min_p_reach))


def typical_p(logits: _CandidateLogits, share: float) -> _Indices:
    """Locally typical sampling (Meister et al. 2022): keeps the fewest tokens that hold more than `share` of the mass
    together, beginning with those whose surprise is closest to the entropy. Returns their indices, most likely first.
    """
    peak = logits.max()
    surprise = peak + np.log(np.exp(logits - peak).sum()) - logits
    probabilities = np.exp(-surprise)
    deviation = np.abs(surprise - (probabilities * surprise).sum())
    kept = np.sort(_lowest(deviation, probabilities, share))
    ranked: _Indices = kept[(-logits[kept]).argsort(kind="stable")]
    return ranked


def top_p(logits: _CandidateLogits, share: float, mass: float | None = None) -> slice:
    """Nucleus sampling (Holtzman et al. 2020): keeps the fewest first tokens that hold at least `share` of `mass`.

    `logits` are in descending order. `mass` is a sum of exp(logit - maximum); None means the sum over `logits`.
    """
    held = np.exp(logits - logits[0]).cumsum()
    return slice(int(held.searchsorted(share * (held[-1] if mass is None else mass))) + 1)


def min_p(logits: _CandidateLogits, share: float) -> _Mask:
    """Keeps the tokens whose probability is at least `share` times that of the most likely token."""
    kept: _Mask = logits >= logits.max() + math.log(share)
    return kept


def xtc(logits: _CandidateLogits, threshold: float) -> _Mask:
    """Exclude top choices (p-e-w 2024): drops the tokens with a probability of at least `threshold`, except the least
    likely of them. A threshold above 0.5 drops nothing.
    """
    weights = np.exp(logits - logits.max())
    above = (weights >= threshold * weights.sum()).nonzero()[0]
    kept = np.ones(len(logits), np.bool_)
    if threshold <= 0.5 and len(above) > 1:
        kept[above[(-logits[above]).argsort(kind="stable")[:-1]]] = False
    return kept


def _lowest(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> _Indices:
    """Returns the indices of the lowest scores, in ascending order of score: the fewest whose weights add up to more
    than `share`. Sorts at most eight times as many scores as necessary."""
    size = 256
    while size < len(scores):
        near = (scores <= np.partition(scores, size)[size]).nonzero()[0]
        if weights[near].sum() > share:
            break
        size *= 8
    else:
        near = np.arange(len(scores))
    order: _Indices = near[scores[near].argsort(kind="stable")]
    held = weights[order].cumsum()
    return order[: int(held.searchsorted(share, side="right")) + 1]
