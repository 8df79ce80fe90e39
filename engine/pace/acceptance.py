"""Chance that the tokens of a proposer's drafts are accepted, learned from every draft."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import sqrt
from operator import mul, neg

# Number of positions in a draft with an estimate of their own; later positions share the last estimate.
_POSITIONS = 16
# Upper bounds of the classes of stated chances: chances, 0 to 1, by the proposer's own estimate.
_STATED_BOUNDS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
# Factor on the weight of older observations at each new one of the same class. The estimate of one sequence follows
# about its last twelve observations, so that it adapts when the output changes; that of the engine about a hundred.
_SEQUENCE_DECAY, _ENGINE_DECAY = 0.92, 0.99
# The prior has the weight of this many observations.
_PRIOR_WEIGHT = 3.0
# Chance of a token without observations. It need not be higher for exploration, because drafts are compared with the
# emitted tokens even if they are not verified.
PRIOR_CHANCE = 0.4
# Number of standard deviations that are subtracted from a mean, because the best of many means is often too high.
_DEVIATIONS = 0.5
# A curve ends before the first token for which the chance that it and all tokens before it are accepted is lower.
MIN_CHANCE = 0.02

# The initial mean of each class of stated chances: `PRIOR_CHANCE` times twice the centre of the class.
_CENTRES = tuple(
    PRIOR_CHANCE * (low + high) for low, high in zip((0.0, *_STATED_BOUNDS), (*_STATED_BOUNDS, 1.0), strict=True)
)
_START = (*(PRIOR_CHANCE for _ in range(_POSITIONS)), *_CENTRES)


class AcceptanceEstimate:
    """Chance that a token of a draft is accepted if all tokens before it are: by position, and by stated chance.

    A stated chance is the proposer's own estimate. `prior` is the estimate of the whole engine; it dominates while a
    sequence has few observations. A draft that is accepted as a whole is no evidence about later positions, and tokens
    after a rejected one are no evidence.
    """

    def __init__(self, prior: AcceptanceEstimate | None = None) -> None:
        self._prior = prior
        self._decay = _SEQUENCE_DECAY if prior is not None else _ENGINE_DECAY
        self._observed = [0.0] * len(_START)
        self._accepted = [0.0] * len(_START)
        self._engine_means: list[float] | None = None  # without a prior: the means; None if outdated

    def observe(self, start: int, accepted: int, rejected: bool, stated: Sequence[float] = ()) -> None:
        """Records that the `accepted` tokens from position `start` of a draft on were accepted, and whether the next
        token was `rejected`. Updates the prior too.

        `stated` are the stated chances of the draft; empty if the proposer makes no estimates.
        """
        end = start + accepted + rejected
        positions = range(start, end)
        self._learn(positions if end <= _POSITIONS else [min(each, _POSITIONS - 1) for each in positions], accepted)
        if stated:
            self._learn([_class(each, stated[each]) for each in positions], accepted)

    def _learn(self, classes: Sequence[int], accepted: int) -> None:
        """Records one observation of each of `classes`, in this order: the first `accepted` ones were accepted."""
        observed, hits, decay = self._observed, self._accepted, self._decay
        for index in classes[:accepted]:
            observed[index] = observed[index] * decay + 1.0
            hits[index] = hits[index] * decay + 1.0
        for index in classes[accepted:]:
            observed[index] = observed[index] * decay + 1.0
            hits[index] *= decay
        self._engine_means = None
        if self._prior is not None:
            self._prior._learn(classes, accepted)

    def _means(self, count: int = len(_START)) -> list[float]:
        """Returns the means of the first `count` classes, given their priors: those of the engine, or without a prior
        the mean of the position before, as a position may have few observations."""
        if self._prior is not None:
            found = zip(self._accepted, self._observed, self._prior._means(count), strict=False)
            return [prior + (hits - seen * prior) / (seen + _PRIOR_WEIGHT) for hits, seen, prior in found]
        if self._engine_means is None:
            means, before = list[float](), PRIOR_CHANCE
            for index, (hits, seen) in enumerate(zip(self._accepted, self._observed, strict=True)):
                prior = before if index < _POSITIONS else _START[index]
                before = prior + (hits - seen * prior) / (seen + _PRIOR_WEIGHT)
                means.append(before)
            self._engine_means = means
        return self._engine_means[:count]

    def chance(self, position: int, stated: float | None = None) -> float:
        """Returns the chance, 0 to 1, that the token at `position`, counted from 0, is accepted."""
        index = _class(position, stated)
        return self._first_chance(index, self._means()[index])

    def _first_chance(self, index: int, mean: float) -> float:
        """Returns the chance of a token of a class with this mean; with few observations it is lower than the mean."""
        if not (observed := self._observed[index]):
            return mean if self._prior is None else self._prior._first_chance(index, mean)
        return max(0.0, mean - _DEVIATIONS * sqrt(mean * max(0.0, 1.0 - mean) / (observed + _PRIOR_WEIGHT + 1.0)))

    def curve(self, length: int, stated: Sequence[float] = ()) -> list[float]:
        """Returns, for each token of a draft, the chance that it and all tokens before it are accepted. The curve ends
        before the first chance below `MIN_CHANCE`.

        `stated` are the stated chances of the draft; empty if the proposer makes no estimates.
        """
        if not length:
            return []
        if stated:
            classes, means = [_class(0, chance) for chance in stated[:length]], self._means()
            chances = [means[index] for index in classes]
        else:
            chances = self._means(min(length, _POSITIONS))
            chances += [chances[-1]] * (length - _POSITIONS)
        # The deviation is subtracted once, not per token.
        chances[0] = self._first_chance(classes[0] if stated else 0, chances[0])
        curve = [*accumulate(chances, mul)]
        return curve if curve[-1] >= MIN_CHANCE else curve[: bisect_right(curve, -MIN_CHANCE, key=neg)]


def _class(position: int, stated: float | None) -> int:
    """Returns the index of a token's class: by its stated chance, or by its position without a stated chance."""
    return min(position, _POSITIONS - 1) if stated is None else _POSITIONS + bisect_right(_STATED_BOUNDS, stated)
