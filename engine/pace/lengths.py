"""Computes the number of tokens of each draft that the next step verifies. Pure functions.

The lengths maximise the product of the speeds of all sequences (Nash 1950; proportional fairness, Kelly et al. 1998):
the factor by which a draft speeds up one sequence must exceed the factors by which the longer step slows down all
others together. The sum of the speeds would let one sequence that repeats itself hold up all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import numpy as np

from engine.pace.curve import Seconds
from engine.pace.passes import Indices, StepMatrix

# For each token of a draft the chance that it and all tokens before it are accepted, in descending order.
Chances = Sequence[float]

# Number of alternative steps that `best_lengths_per_slot` compares; more would take longer than they can gain.
_MAX_STEPS = 512


class DraftLengths(NamedTuple):
    """Lengths of drafts, and the expected result of a step with these lengths."""

    lengths: list[int]
    """Tokens of each draft."""
    gain: float
    """Expected number of accepted tokens."""
    rate: float
    """Tokens per second of the step if every sequence had the geometric mean of their speeds."""
    row_price: float = 0.0
    """Tokens that the step yields in the time that one drafted token costs; in that of the first drafted token if all
    `lengths` are 0."""


def best_lengths(curves: Sequence[Chances], seconds: Seconds, base_tokens: float, min_tokens: int = 0) -> DraftLengths:
    """Returns the best lengths, with at least `min_tokens` tokens in all, if the cost depends only on the total.

    `seconds[k]` is the cost of the step with `k` drafted tokens. Without these drafts the step emits `base_tokens`
    tokens, each of which counts as one sequence.

    The worth of a token is its part of the logarithm of the product of speeds, and decreases along a draft. So for each
    total the tokens of largest worth are best, and one scan over all totals gives the optimum for any `seconds`.
    """
    chances, sizes = _flat(curves)
    _, worth = _worth(chances, sizes)
    order = np.argsort(-worth)[: len(seconds) - 1]
    seconds = seconds[: 1 + len(order)]
    rates = _rates(_sums(worth[order]), seconds, base_tokens)
    total = min_tokens + int(np.argmax(rates[min_tokens:])) if min_tokens < len(rates) else len(order)
    lengths = np.bincount(np.repeat(np.arange(len(curves)), sizes)[order[:total]], minlength=len(curves))
    price = _row_price(float(rates[total]), seconds, total, total) if len(seconds) > 1 else 0.0
    return DraftLengths(lengths.tolist(), float(chances[order[:total]].sum()), float(rates[total]), price)


def best_lengths_per_slot(
    curves: Sequence[Chances],
    cost: Callable[[StepMatrix], Seconds],
    base_tokens: float,
    max_tokens: int,
    min_tokens: int = 0,
    steps: int = _MAX_STEPS,
) -> DraftLengths:
    """Returns good lengths, with `min_tokens` to `max_tokens` tokens in all, if the cost depends on each draft's
    length.

    `cost(lengths)` returns the seconds of steps with `lengths[i, k]` tokens of draft i in step k; step 0 has no drafts.
    About `steps` alternative steps are compared. The step without drafts is one of them, so without `min_tokens` the
    result is never worse than no drafts. The others are:

    - the nested steps of `best_lengths`: for each total the tokens of largest worth, best if each row has a cost;
    - for each length the drafts of largest worth, cut to that length, best if each pass has a cost.
    """
    chances, sizes = _flat([curve[:max_tokens] for curve in curves])
    logs, own = _worth(chances, sizes)
    families = [_nested(own, sizes, max_tokens, steps // 2)]
    if np.count_nonzero(sizes) > 1:
        families.append(_equal(logs, sizes, max_tokens, steps // 2))
    lengths, tokens, worth = (np.concatenate(parts, axis=-1) for parts in zip(*families, strict=True))
    seconds = cost(lengths)
    rates = _rates(worth, seconds, base_tokens)
    allowed = np.where(tokens >= min(min_tokens, int(tokens.max())), rates, 0.0) if min_tokens else rates
    best = int(np.argmax(allowed))
    chosen: list[int] = lengths[:, best].tolist()
    gain = sum(sum(curve[:length]) for curve, length in zip(curves, chosen, strict=True) if length)
    price = _row_price(float(rates[best]), seconds, best, int(tokens[best])) if len(seconds) > 1 else 0.0
    return DraftLengths(chosen, gain, float(rates[best]), price)


class _Family(NamedTuple):
    """Alternative steps, as arrays with one column for each step."""

    lengths: StepMatrix
    """Tokens of each draft, [drafts, steps]."""
    tokens: Indices
    """Tokens of all drafts together, [steps]."""
    worth: Seconds
    """Sum of the worth of all tokens, [steps]."""


def _nested(own: Seconds, sizes: Indices, max_tokens: int, steps: int) -> _Family:
    """Returns, for about `steps` totals from 0 to `max_tokens`, the step with the tokens of largest worth."""
    order = np.argsort(-own)[:max_tokens]
    draft = np.repeat(np.arange(len(sizes)), sizes)[order]
    totals = _spread(1 + len(order), steps)
    place = draft * len(totals) + np.searchsorted(totals, np.arange(1, 1 + len(order)))
    more = np.bincount(place, minlength=len(sizes) * len(totals)).reshape(len(sizes), -1)
    return _Family(more.cumsum(axis=1, dtype=np.int16), totals, _sums(own[order])[totals])


def _equal(logs: Seconds, sizes: Indices, max_tokens: int, steps: int) -> _Family:
    """Returns, for about `steps` pairs of a length and a number of drafts, the step with that number of drafts of
    largest worth, cut to that length. Steps with more than `max_tokens` tokens are left out."""
    count, longest = int(np.count_nonzero(sizes)), int(sizes.max())
    # All lengths if there are few drafts, some lengths if there are many.
    length = 1 + _spread(longest, max(4, steps // count))
    rank = count - 1 - _spread(count, max(4, steps // len(length)))
    upto = np.minimum(length, sizes[:, None]).astype(np.int16)
    ends = (sizes.cumsum() - sizes)[:, None] + upto - 1
    worth = np.where(upto > 0, logs.take(ends, mode="clip"), 0.0)
    worth -= 1e-9 * np.arange(len(sizes))[:, None]  # so that no two drafts have the same worth
    ordered = np.sort(worth, axis=0)[::-1]
    taken = worth[:, None, :] >= ordered[rank]
    lengths = (taken * upto[:, None, :]).reshape(len(sizes), -1)
    tokens = lengths.sum(axis=0)
    kept = np.flatnonzero(tokens <= max_tokens)
    return _Family(lengths.take(kept, axis=1), tokens[kept], ordered.cumsum(axis=0)[rank].ravel()[kept])


@lru_cache(256)
def _spread(count: int, max_indices: int) -> Indices:
    """Returns all indices below `count`, or about `max_indices` of them, denser at the start, as a read-only array."""
    if count <= max_indices:
        return np.arange(count)
    return np.unique(np.geomspace(1, count, max(2, max_indices)).astype(np.intp)) - 1


def _flat(curves: Sequence[Chances]) -> tuple[Seconds, Indices]:
    """Returns the chances of all curves in one array, and the lengths of the curves."""
    sizes = np.array([*map(len, curves)], np.intp)
    return np.fromiter(chain.from_iterable(curves), np.float64, int(sizes.sum())), sizes


def _worth(chances: Seconds, sizes: Indices) -> tuple[Seconds, Seconds]:
    """Returns two arrays over the tokens of the flattened drafts.

    The first is the logarithm of the factor by which the draft up to the token raises its sequence's speed, the second
    the token's own part of that logarithm: its worth.
    """
    sums = _sums(chances)
    starts = np.cumsum(sizes) - sizes
    logs = np.log1p(sums[1:] - np.repeat(sums[starts], sizes))
    own = logs.copy()
    own[1:] -= logs[:-1]
    first = starts[sizes > 0]
    own[first] = logs[first]
    return logs, own


def _rates(worth: Seconds, seconds: Seconds, base_tokens: float) -> Seconds:
    """Returns the tokens per second of steps that take `seconds`, by the geometric mean of `base_tokens` speeds.

    `worth` is, for each step, the sum of the logarithms of the factors by which drafts raise these speeds.
    """
    rates: Seconds = base_tokens * np.exp(worth / base_tokens) / seconds
    return rates


def _row_price(rate: float, seconds: Seconds, best: int, tokens: int) -> float:
    """Returns the tokens that the step `best`, at `rate`, yields in the mean time that each of its drafted `tokens`
    costs."""
    return rate * float(seconds[best or 1] - seconds[0]) / max(1, tokens)


def _sums(values: Seconds) -> Seconds:
    """Returns the sums of the first 0, 1, 2 ... of `values`."""
    sums = np.zeros(1 + len(values))
    values.cumsum(out=sums[1:])
    return sums


def pick_draft(curves: Sequence[Chances], row_price: float) -> int:
    """Returns the index of the best draft for one sequence, if a row costs as much as `row_price` tokens."""
    best, best_worth = 0, -1.0
    for i, curve in enumerate(curves):
        worth = 0.0
        for chance in curve:
            if chance <= row_price:
                break
            worth += chance - row_price
        if worth > best_worth or (worth == best_worth and sum(curve) > sum(curves[best])):
            best, best_worth = i, worth
    return best


def equal_lengths(
    curves: Sequence[Chances], seconds: Seconds, base_tokens: float, position_seconds: float, min_tokens: int = 1
) -> tuple[int, float]:
    """Returns the best common length of all drafts, and the tokens per second with it, as in `DraftLengths`.

    The length is 0 or at least `min_tokens`. `seconds[m]` is the cost of the step that verifies m tokens for each of
    `curves`. Drafting one token for each of `curves` takes `position_seconds`.
    """
    counts = np.arange(len(seconds))
    worth = np.zeros(len(seconds))
    for curve in curves:
        sums = np.log1p(_sums(np.asarray(curve[: len(seconds) - 1], np.float64)))
        worth += np.concatenate((sums, np.full(len(seconds) - len(sums), sums[-1])))
    rates = _rates(worth, seconds + position_seconds * counts, base_tokens)
    rates[1:min_tokens] = 0.0
    best = int(np.argmax(rates))
    return best, float(rates[best])
