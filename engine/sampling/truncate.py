"""Truncation of the candidates: top_k, typical_p, top_p, min_p and XTC, as llama.cpp's samplers define them.

The stages run in that order on the distribution at temperature 1, each on the candidates that the previous stage kept,
with their probabilities renormalised. Each stage keeps at least one token and returns the kept ones as indices, a mask
or a slice. Logits are float64, [candidates], finite and, unless stated otherwise, in any order.
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
    """Returns the tokens of a row that may be picked. Raises BadLogits."""
    found = _top_k(row, params, apply_xtc)
    if params.typical_p < 1.0:
        found = found.only(typical_p(found.logits, params.typical_p))
    if params.top_p < 1.0:
        found = found.only(top_p(found.logits, params.top_p, found.mass))
    if params.min_p > 0.0:
        found = found.only(min_p(found.logits, params.min_p))
    if apply_xtc:
        found = found.only(xtc(found.logits, params.xtc_threshold))
    return found


def _top_k(row: Row, params: SamplingParams, apply_xtc: bool) -> Candidates:
    """Applies top_k and excludes tokens that no later stage can keep or count.

    Tokens `NOISE_SPAN` below the maximum hold less than 1e-12 of the mass at temperature 1, and tokens `NOISE_SPAN` * T
    below it are never picked at temperature T. min_p depends only on the maximum and may therefore be applied early.
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
    """Locally typical sampling (Meister et al. 2022).

    Returns the tokens with a surprise nearest to the entropy, as many as hold more than `share` together, most likely
    first.
    """
    peak = logits.max()
    surprise = peak + np.log(np.exp(logits - peak).sum()) - logits
    probabilities = np.exp(-surprise)
    strangeness = np.abs(surprise - (probabilities * surprise).sum())
    kept = np.sort(_lowest(strangeness, probabilities, share))
    ranked: _Indices = kept[(-logits[kept]).argsort(kind="stable")]
    return ranked


def top_p(logits: _CandidateLogits, share: float, mass: float | None = None) -> slice:
    """Nucleus sampling (Holtzman et al. 2020): the fewest of the first `logits` that hold at least `share` of `mass`.

    `logits` are ordered from the most likely one. `mass` is a sum of exp(logit - maximum); None means the sum over
    `logits`.
    """
    held = np.exp(logits - logits[0]).cumsum()
    return slice(int(held.searchsorted(share * (held[-1] if mass is None else mass))) + 1)


def min_p(logits: _CandidateLogits, share: float) -> _Mask:
    """Keeps the tokens with at least `share` of the probability of the most likely one."""
    kept: _Mask = logits >= logits.max() + math.log(share)
    return kept


def xtc(logits: _CandidateLogits, threshold: float) -> _Mask:
    """Exclude top choices (p-e-w 2024): drops tokens of probability `threshold` or more except the least likely one.

    A threshold above one half excludes nothing.
    """
    weights = np.exp(logits - logits.max())
    above = (weights >= threshold * weights.sum()).nonzero()[0]
    kept = np.ones(len(logits), np.bool_)
    if threshold <= 0.5 and len(above) > 1:
        kept[above[(-logits[above]).argsort(kind="stable")[:-1]]] = False
    return kept


def _lowest(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> _Indices:
    """Returns the indices of the lowest scores in order, as many as have weights that add up to more than `share`.

    Sorts at most eight times as many scores as necessary.
    """
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
