"""Chance that the tokens of a proposer's drafts are accepted, learned from every draft."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt

# Places in a draft that have an estimate of their own; later places share that of the last.
PLACES = 16
# Bounds of the classes of tokens whose proposer states a chance.
LEVELS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
# Weight of an observation after the next one of its kind: about twelve observations of one request count, so that a
# change in the text is followed, and about a hundred of all requests.
MEMORY, LONG_MEMORY = 0.92, 0.99
# Number of observations that the prior counts as.
BELIEF = 3.0
# Chance of a token without observations. Drafts are compared with the emitted tokens even if they are not verified, so
# a higher value is not needed for exploration.
HOPE = 0.4
# Standard deviations that are subtracted from an estimate: the best of many estimates is often an overestimate.
DOUBT = 0.5
# Tokens of a draft after one with a lower chance than this are ignored.
FAINT = 0.02

_CENTRES = tuple(HOPE * (low + high) for low, high in zip((0.0, *LEVELS), (*LEVELS, 1.0), strict=True))
_START = (*(HOPE for _ in range(PLACES)), *_CENTRES)


class Acceptance:
    """Chance that a draft's token is accepted if those before it are: by its place, and by its stated chance.

    `prior` holds the statistics of the whole engine, which count where a request has few observations. Only compared
    tokens count: a draft that was accepted as a whole says nothing about later places, and neither do the tokens after
    a rejected one.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._memory = MEMORY if prior is not None else LONG_MEMORY
        self._tried = [0.0] * len(_START)
        self._right = [0.0] * len(_START)
        self._means: list[float] = [*(prior._means if prior is not None else _START)]

    def observe(self, place: int, stated: float | None, right: bool) -> None:
        """Records whether the token at `place` was right; those before it were.

        `stated` is the proposer's own estimate of the chance, `None` if it makes none. The prior is updated too.
        """
        kinds = (_kind(place, None),) if stated is None else (_kind(place, None), _kind(place, stated))
        for one in (self,) if self._prior is None else (self._prior, self):
            for kind in kinds:
                one._learn(kind, right)

    def _learn(self, kind: int, right: bool) -> None:
        self._tried[kind] = self._tried[kind] * self._memory + 1.0
        self._right[kind] = self._right[kind] * self._memory + right
        self._estimate(kind)
        if self._prior is None and kind < PLACES:  # a place with few observations takes the estimate of the last
            for place in range(kind + 1, PLACES):
                if self._tried[place] > BELIEF:
                    break
                self._estimate(place)

    def _estimate(self, kind: int) -> None:
        if self._prior is not None:
            prior = self._prior._means[kind]
        else:
            prior = self._means[kind - 1] if 0 < kind < PLACES else _START[kind]
        self._means[kind] = (self._right[kind] + BELIEF * prior) / (self._tried[kind] + BELIEF)

    def chance(self, place: int, stated: float | None = None) -> float:
        """Returns the chance, 0 to 1, of the token at `place`, counted from 0."""
        kind = _kind(place, stated)
        if self._prior is not None and not self._tried[kind]:  # the prior may have changed since this was made
            return self._prior.chance(place, stated)
        mean, seen = self._means[kind], self._tried[kind]
        if not seen and self._prior is None:
            return mean
        return max(0.0, mean - DOUBT * sqrt(mean * max(0.0, 1.0 - mean) / (seen + BELIEF + 1.0)))

    def curve(self, length: int, stated: Sequence[float] = ()) -> list[float]:
        """Returns for each token of a draft the chance that it and all before it are accepted, down to `FAINT`.

        `stated` are the proposer's own estimates; empty if it makes none.
        """
        if not length:
            return []
        together = self.chance(0, stated[0] if stated else None)  # the deviation is subtracted once, not per token
        curve = [together] if together >= FAINT else []
        means, tried = self._means, self._tried
        before = means if self._prior is None else self._prior._means
        for place in range(1, length) if curve else ():
            kind = _kind(place, stated[place]) if stated else min(place, PLACES - 1)
            together *= means[kind] if tried[kind] else before[kind]
            if together < FAINT:
                break
            curve.append(together)
        return curve


def _kind(place: int, stated: float | None) -> int:
    """Returns the index of the statistics of a token: that of its stated chance, or else of its place."""
    return min(place, PLACES - 1) if stated is None else PLACES + bisect_right(LEVELS, stated)
