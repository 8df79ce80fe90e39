"""How many tokens of each draft the next step verifies. Pure policy: values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.pace.curve import Seconds

Chances = Sequence[float]
"""For each token of a draft the chance that it and all before it are right; never rises."""


class Shares(NamedTuple):
    """What to verify, and what it promises."""

    lengths: list[int]
    """Tokens for each draft."""
    gain: float
    """Tokens that are likely to be accepted."""
    rate: float
    """Tokens a second of the step, were they as many for each as their geometric mean."""


def share(
    curves: Sequence[Chances], seconds: Seconds, sure: float, weights: Sequence[float] = (), least: int = 0
) -> Shares:
    """The lengths with which a step is fastest for all who take part, and at least `least` tokens in all.

    `seconds[k]` is the cost of the step with `k` drafted tokens; of `sure` streams each gets a token without any. The
    product of all streams' speeds is made as large as it can be (Nash 1950; proportional fairness, Kelly et al. 1998):
    what a draft gives one stream must be more, as a factor, than what the longer step takes from all others together.
    The sum of speeds would let one that repeats itself hold up everybody else.

    The logarithm of that product gains less with each token of a draft. So for a given number of tokens the largest
    gains are best, and one sorted scan over every total finds the optimum however the cost jumps from one total to the
    next. With `weights`, one for each curve, a token of one counts for more than that of another: for those who are
    late, or were promised a speed.
    """
    chances = np.array([*chain.from_iterable(curves)])
    sizes = np.array([*map(len, curves)])
    worth = _worth(chances, sizes)
    if weights:
        worth *= np.repeat(weights, sizes)
    order = np.argsort(-worth)[: len(seconds) - 1]
    rates = _rates(_sums(worth[order]), seconds[: 1 + len(order)], sure)
    total = least + int(np.argmax(rates[least:])) if least < len(rates) else len(order)
    if not total:
        return Shares([0] * len(curves), 0.0, float(rates[0]))
    chosen = order[:total]
    lengths: list[int] = np.bincount(np.repeat(np.arange(len(curves)), sizes)[chosen], minlength=len(curves)).tolist()
    return Shares(lengths, float(chances[chosen].sum()), float(rates[total]))


def _worth(chances: Seconds, sizes: NDArray[np.intp]) -> Seconds:
    """By how much each token of drafts of these sizes, one after the other, raises the logarithm of its stream's
    speed."""
    sums = _sums(chances)
    starts = np.cumsum(sizes) - sizes
    logs = np.log1p(sums[1:] - np.repeat(sums[starts], sizes))
    before = np.concatenate(((0.0,), logs))[:-1]
    before[starts[sizes > 0]] = 0.0
    worth: Seconds = logs - before
    return worth


def _rates(worth: Seconds, seconds: Seconds, sure: float) -> Seconds:
    """Tokens a second of steps that take so long, for the geometric mean of `sure` streams; `worth` is by how much the
    logarithms of their speeds are raised together."""
    rates: Seconds = sure * np.exp(worth / sure) / seconds
    return rates


def _sums(values: Chances | Seconds) -> Seconds:
    """Of none, one, two ... values."""
    return np.concatenate(((0.0,), np.cumsum(values)))


def pick(candidates: Sequence[Chances], price: float) -> int:
    """Which of several drafts for one slot is worth most, where a row costs as much as `price` tokens."""
    best, most = 0, -1.0
    for i, curve in enumerate(candidates):
        worth = 0.0
        for chance in curve:
            if chance <= price:
                break
            worth += chance - price
        if worth > most or (worth == most and sum(curve) > sum(candidates[best])):
            best, most = i, worth
    return best


def places(
    curves: Sequence[Chances], seconds: Seconds, sure: float, each: float, most: int, least: int = 1
) -> tuple[int, float]:
    """How far, from `least` to `most` tokens, the draft model should guess for everybody in `curves`, and the tokens a
    second with that, as `share` counts them.

    Each place costs `each` seconds for all of them together; all that is guessed is verified. 0 is nothing.
    """
    most = min(most, (len(seconds) - 1) // max(1, len(curves)))
    worth = np.zeros(most + 1)
    for curve in curves:
        sums = np.log1p(_sums(curve[:most]))
        worth += np.concatenate((sums, np.full(most + 1 - len(sums), sums[-1])))
    rows = len(curves) * np.arange(most + 1)
    rates = _rates(worth, seconds[rows] + each * np.arange(most + 1), sure)
    rates[1:least] = 0.0
    best = int(np.argmax(rates))
    return best, float(rates[best])
