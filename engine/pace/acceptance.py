"""Chance that the tokens of a proposer's drafts are accepted, learned from every draft."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt

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
        self._means: list[float] = [*(prior._means if prior is not None else _START)]

    def observe(self, position: int, stated: float | None, accepted: bool) -> None:
        """Records whether the token at `position` was accepted, given that all tokens before it were. Updates the prior
        too.

        `stated` is the token's stated chance. `None` means that the proposer makes no estimates.
        """
        classes = (_class(position, None),) if stated is None else (_class(position, None), _class(position, stated))
        for estimate in (self,) if self._prior is None else (self._prior, self):
            for index in classes:
                estimate._learn(index, accepted)

    def _learn(self, index: int, accepted: bool) -> None:
        self._observed[index] = self._observed[index] * self._decay + 1.0
        self._accepted[index] = self._accepted[index] * self._decay + accepted
        self._update_mean(index)
        if (
            self._prior is None and index < _POSITIONS
        ):  # a position with few observations has the position before it as its prior
            for position in range(index + 1, _POSITIONS):
                if self._observed[position] > _PRIOR_WEIGHT:
                    break
                self._update_mean(position)

    def _update_mean(self, index: int) -> None:
        if self._prior is not None:
            prior = self._prior._means[index]
        else:
            prior = self._means[index - 1] if 0 < index < _POSITIONS else _START[index]
        self._means[index] = (self._accepted[index] + _PRIOR_WEIGHT * prior) / (self._observed[index] + _PRIOR_WEIGHT)

    def chance(self, position: int, stated: float | None = None) -> float:
        """Returns the chance, 0 to 1, that the token at `position`, counted from 0, is accepted."""
        index = _class(position, stated)
        if (
            self._prior is not None and not self._observed[index]
        ):  # the prior may have changed since `_means` was copied from it
            return self._prior.chance(position, stated)
        mean, observed = self._means[index], self._observed[index]
        if not observed and self._prior is None:
            return mean
        return max(0.0, mean - _DEVIATIONS * sqrt(mean * max(0.0, 1.0 - mean) / (observed + _PRIOR_WEIGHT + 1.0)))

    def curve(self, length: int, stated: Sequence[float] = ()) -> list[float]:
        """Returns, for each token of a draft, the chance that it and all tokens before it are accepted. The curve ends
        before the first chance below `MIN_CHANCE`.

        `stated` are the stated chances of the draft; empty if the proposer makes no estimates.
        """
        if not length:
            return []
        joint = self.chance(0, stated[0] if stated else None)  # the deviation is subtracted once, not per token
        curve = [joint] if joint >= MIN_CHANCE else []
        means, observed = self._means, self._observed
        prior = means if self._prior is None else self._prior._means
        for position in range(1, length) if curve else ():
            index = _class(position, stated[position]) if stated else min(position, _POSITIONS - 1)
            joint *= means[index] if observed[index] else prior[index]
            if joint < MIN_CHANCE:
                break
            curve.append(joint)
        return curve


def _class(position: int, stated: float | None) -> int:
    """Returns the index of a token's class: by its stated chance, or by its position without a stated chance."""
    return min(position, _POSITIONS - 1) if stated is None else _POSITIONS + bisect_right(_STATED_BOUNDS, stated)
