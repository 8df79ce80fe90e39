"""How many tokens of each draft the next step verifies. Pure policy: values in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

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
    """Tokens a second of the step, those that need no guess included."""


def share(
    curves: Sequence[Chances], seconds: Seconds, sure: float, weights: Sequence[float] = (), least: int = 0
) -> Shares:
    """The lengths with which a step yields most tokens a second, and at least `least` tokens in all.

    `seconds[k]` is the cost of the step with `k` drafted tokens, `sure` what it yields without any. For a given number
    of tokens the best gain is the sum of the largest chances, so one sorted scan over every total finds the optimum
    however the cost jumps from one total to the next. With `weights`, one for each curve, a token of one counts for
    more than that of another: for those who are late, or were promised a speed.
    """
    chances = np.array([*chain.from_iterable(curves)])
    sizes = [*map(len, curves)]
    if weights:
        chances *= np.repeat(weights, sizes)
    order = np.argsort(-chances)[: len(seconds) - 1]
    gains = np.concatenate(((0.0,), np.cumsum(chances[order])))
    rates = (sure + gains) / seconds[: len(gains)]
    total = least + int(np.argmax(rates[least:])) if least < len(rates) else len(order)
    if not total:
        return Shares([0] * len(curves), 0.0, float(rates[0]))
    owners = np.repeat(np.arange(len(curves)), sizes)[order[:total]]
    lengths: list[int] = np.bincount(owners, minlength=len(curves)).tolist()
    return Shares(lengths, float(gains[total]), float(rates[total]))


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
    second with that.

    Each place costs `each` seconds for all of them together; all that is guessed is verified. 0 is nothing.
    """
    most = min(most, (len(seconds) - 1) // max(1, len(curves)))
    gains = np.zeros(most + 1)
    for curve in curves:
        reached = curve[:most]
        gains[1 : len(reached) + 1] += reached
    rows = len(curves) * np.arange(most + 1)
    rates = (sure + np.cumsum(gains)) / (seconds[rows] + each * np.arange(most + 1))
    rates[1:least] = 0.0
    best = int(np.argmax(rates))
    return best, float(rates[best])
