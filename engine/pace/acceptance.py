"""Chance that the tokens of a proposer's drafts are accepted, learned from every draft."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt

# Positions in a draft with an estimate of their own; later positions share that of the last.
_POSITIONS = 16
# Bounds of the classes of tokens with a stated chance.
_STATED_BOUNDS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
# Weight of an observation after the next one of its class: about twelve observations of one sequence count, so that a
# change in the output is followed, and about a hundred of all sequences.
_SEQUENCE_DECAY, _ENGINE_DECAY = 0.92, 0.99
# Number of observations that the prior counts as.
_PRIOR_WEIGHT = 3.0
# Chance of a token without observations. Drafts are compared with the emitted tokens even if they are not verified, so
# a higher value is not needed for exploration.
PRIOR_CHANCE = 0.4
# Standard deviations that are subtracted from an estimate: the best of many estimates is often an overestimate.
_DEVIATIONS = 0.5
# A draft ends for the curve at the first token that is accepted, with all before it, with a lower chance than this.
MIN_CHANCE = 0.02

_CENTRES = tuple(
    PRIOR_CHANCE * (low + high) for low, high in zip((0.0, *_STATED_BOUNDS), (*_STATED_BOUNDS, 1.0), strict=True)
)
_START = (*(PRIOR_CHANCE for _ in range(_POSITIONS)), *_CENTRES)


class AcceptanceEstimate:
    """Chance that a draft's token is accepted if those before it are: by its position, and by its stated chance.

    `prior` is the estimate of the whole engine, which counts where a sequence has few observations. Only compared
    tokens count: a draft that is accepted as a whole is no evidence about later positions, and neither are the tokens
    after a rejected one.
    """

    def __init__(self, prior: AcceptanceEstimate | None = None) -> None:
        self._prior = prior
        self._decay = _SEQUENCE_DECAY if prior is not None else _ENGINE_DECAY
        self._observed = [0.0] * len(_START)
        self._accepted = [0.0] * len(_START)
        self._means: list[float] = [*(prior._means if prior is not None else _START)]

    def observe(self, position: int, stated: float | None, accepted: bool) -> None:
        """Records whether the token at `position` was accepted; those before it were. The prior is updated too.

        `stated` is the proposer's own estimate of the chance. It is `None` if the proposer makes none.
        """
        classes = (_class(position, None),) if stated is None else (_class(position, None), _class(position, stated))
        for estimate in (self,) if self._prior is None else (self._prior, self):
            for index in classes:
                estimate._learn(index, accepted)

    def _learn(self, index: int, accepted: bool) -> None:
        self._observed[index] = self._observed[index] * self._decay + 1.0
        self._accepted[index] = self._accepted[index] * self._decay + accepted
        self._update_mean(index)
        if self._prior is None and index < _POSITIONS:  # a position with few observations follows the one before it
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
        """Returns the chance, 0 to 1, of the token at `position`, counted from 0."""
        index = _class(position, stated)
        if self._prior is not None and not self._observed[index]:  # the prior may have changed since this was made
            return self._prior.chance(position, stated)
        mean, observed = self._means[index], self._observed[index]
        if not observed and self._prior is None:
            return mean
        return max(0.0, mean - _DEVIATIONS * sqrt(mean * max(0.0, 1.0 - mean) / (observed + _PRIOR_WEIGHT + 1.0)))

    def curve(self, length: int, stated: Sequence[float] = ()) -> list[float]:
        """Returns for each token of a draft the chance that it and all before it are accepted, down to `MIN_CHANCE`.

        `stated` are the proposer's own estimates; empty if it makes none.
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
    """Returns the index of the observations of a token: by its stated chance, or else by its position."""
    return min(position, _POSITIONS - 1) if stated is None else _POSITIONS + bisect_right(_STATED_BOUNDS, stated)
