"""Which candidates may be picked: top_k, typical_p, top_p, min_p and XTC, as llama.cpp's samplers define them.

They run in that order, all on the distribution at temperature 1, and each sees the shares of what the one before
it left. Every one keeps at least one token. Logits here are float64, [candidates], in any order, and finite.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.contract import SamplingParams
from engine.sampling.candidates import Candidates, Row, nucleus, top, within
from engine.sampling.noise import REACH

Logits = NDArray[np.float64]
Indices = NDArray[np.intp]


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
    as it takes to hold more than `share`."""
    surprise = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits
    probabilities = np.exp(-surprise)
    strangeness = np.abs(surprise - (probabilities * surprise).sum())
    return np.sort(_lowest(strangeness, probabilities, share, side="right"))


def top_p(logits: Logits, share: float, mass: float | None = None) -> Indices:
    """Nucleus sampling (Holtzman et al. 2020): the likeliest tokens, likeliest first, as many as it takes to hold
    at least `share` of `mass`, the sum of exp(logit - maximum) over more than the tokens given."""
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    held = np.exp(ranked - ranked[0]).cumsum()
    return order[: held.searchsorted(share * (held[-1] if mass is None else mass)) + 1]


def min_p(logits: Logits, share: float) -> NDArray[np.bool_]:
    """The mask of tokens with at least `share` of the probability of the likeliest one."""
    return logits >= logits.max() + math.log(share)


def xtc(logits: Logits, threshold: float) -> NDArray[np.bool_]:
    """Exclude top choices (p-e-w 2024): the mask of all tokens but those of probability `threshold` or more, of
    which the least likely one stays. A threshold above one half excludes nothing."""
    weights = np.exp(logits - logits.max())
    above = weights >= threshold * weights.sum()
    if np.count_nonzero(above) < 2 or threshold > 0.5:
        return np.ones_like(above)
    tops = above.nonzero()[0]
    above[tops[np.argsort(-logits[tops], kind="stable")[-1]]] = False
    return ~above


def _lowest(
    scores: NDArray[np.float64], weights: NDArray[np.float64], share: float, side: Literal["left", "right"]
) -> Indices:
    """Indices of the lowest scores in order, up to the one at which their weights add up to `share`."""
    size = 256
    while size < len(scores):
        near = (scores <= np.partition(scores, size)[size]).nonzero()[0]
        if weights[near].sum() > share:
            break
        size *= 8
    else:
        near = np.arange(len(scores))
    order = near[np.argsort(scores[near], kind="stable")]
    return order[: weights[order].cumsum().searchsorted(share, side=side) + 1]
