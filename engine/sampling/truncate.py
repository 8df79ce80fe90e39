"""Which candidates may be picked: top_k, typical_p, top_p, min_p and XTC, as llama.cpp's samplers define them.

They run in that order, all on the distribution at temperature 1, and each sees the shares of what the one before
it left. Every one keeps at least one token and says which: indices, a mask or a slice. Logits are float64,
[candidates], finite and in any order unless it says otherwise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.contract import SamplingParams
from engine.sampling.candidates import Candidates, Row, nucleus, top, within
from engine.sampling.noise import REACH

Logits = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]


def survivors(row: Row, params: SamplingParams, exclude: bool) -> Candidates:
    """The tokens of a row that may be picked; XTC acts on it if `exclude`."""
    found = _found(row, params, exclude)
    if params.typical_p < 1.0:
        found = found.only(typical_p(found.logits, params.typical_p))
    if params.top_p < 1.0:
        found = found.only(top_p(found.logits, params.top_p, found.mass))
    if params.min_p > 0.0:
        found = found.only(min_p(found.logits, params.min_p))
    if exclude:
        found = found.only(xtc(found.logits, params.xtc_threshold))
    return found


def _found(row: Row, params: SamplingParams, exclude: bool) -> Candidates:
    """What top_k leaves, less tokens that cannot be picked and have no part in the shares of the later stages.

    Tokens `REACH` below the maximum hold less than 1e-12 of the mass at temperature 1, and at temperature T those
    `REACH` * T below are never picked. min_p goes by the maximum alone and may be asked early.
    """
    temperature = params.temperature
    wide = REACH * max(temperature, 1.0)
    if params.top_k > 0:
        return top(row, params.top_k, wide)
    if params.typical_p < 1.0:
        return within(row, wide)
    floor = -math.log(params.min_p) if params.min_p > 0.0 else math.inf
    if params.top_p < 1.0:
        return nucleus(row, params.top_p, min(wide, floor))
    return within(row, min(wide if exclude else REACH * temperature, floor))


def typical_p(logits: Logits, share: float) -> Indices:
    """Locally typical sampling (Meister et al. 2022): the tokens whose surprise is nearest to the entropy, as many
    as it takes to hold more than `share`; likeliest first."""
    peak = logits.max()
    surprise = peak + np.log(np.exp(logits - peak).sum()) - logits
    probabilities = np.exp(-surprise)
    strangeness = np.abs(surprise - (probabilities * surprise).sum())
    kept = np.sort(_lowest(strangeness, probabilities, share))
    ranked: Indices = kept[(-logits[kept]).argsort(kind="stable")]
    return ranked


def top_p(logits: Logits, share: float, mass: float | None = None) -> slice:
    """Nucleus sampling (Holtzman et al. 2020): of logits with the likeliest first, as many as it takes to hold at
    least `share` of `mass`, the sum of exp(logit - maximum) over these tokens or more."""
    held = np.exp(logits - logits[0]).cumsum()
    return slice(int(held.searchsorted(share * (held[-1] if mass is None else mass))) + 1)


def min_p(logits: Logits, share: float) -> Mask:
    """The tokens with at least `share` of the probability of the likeliest one."""
    kept: Mask = logits >= logits.max() + math.log(share)
    return kept


def xtc(logits: Logits, threshold: float) -> Mask:
    """Exclude top choices (p-e-w 2024): all tokens but those of probability `threshold` or more, of which the
    least likely one stays. A threshold above one half excludes nothing."""
    weights = np.exp(logits - logits.max())
    above = (weights >= threshold * weights.sum()).nonzero()[0]
    kept = np.ones(len(logits), np.bool_)
    if threshold <= 0.5 and len(above) > 1:
        kept[above[(-logits[above]).argsort(kind="stable")[:-1]]] = False
    return kept


def _lowest(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> Indices:
    """Indices of the lowest scores in order, up to the one with which their weights add up to more than `share`.

    Sorts no more of them than that takes, give or take a factor of eight.
    """
    size = 256
    while size < len(scores):
        near = (scores <= np.partition(scores, size)[size]).nonzero()[0]
        if weights[near].sum() > share:
            break
        size *= 8
    else:
        near = np.arange(len(scores))
    order: Indices = near[scores[near].argsort(kind="stable")]
    held = weights[order].cumsum()
    return order[: int(held.searchsorted(share, side="right")) + 1]
