"""How likely the tokens of a speculator's drafts are right, learnt from every draft."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import sqrt

PLACES = 16
"""Places in a draft that are told apart; those after them count as the last."""
LEVELS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
"""Where a speculator says how likely a token is, what it says is told apart by these bounds."""
MEMORY, LONG_MEMORY = 0.92, 0.99
"""What an observation is still worth after the next one of its kind: about twelve of one request count, so that a text
that changes its character is followed, and about a hundred of all."""
BELIEF = 3.0
"""Observations that the prior is worth."""
HOPE = 0.4
"""The chance of a token of which nothing is known. Guesses are compared with what comes without being verified, so
that hope is not needed to find out."""
DOUBT = 0.5
"""Standard deviations by which a chance is taken to be less than it seems: of many, the best is often just lucky."""
FAINT = 0.02
"""Less likely than this, the rest of a draft is not looked at."""

_CENTRES = tuple(HOPE * (low + high) for low, high in zip((0.0, *LEVELS), (*LEVELS, 1.0), strict=True))
_START = (*(HOPE for _ in range(PLACES)), *_CENTRES)


class Acceptance:
    """The chance that a draft's token is right if those before it were: by its place, and by what its speculator said.

    `prior` is what to believe where there are few observations: the same of the whole engine. A draft that was right
    to its end says nothing of what would have come after it, and one that was wrong nothing of what did: only tokens
    that were compared count.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._memory = MEMORY if prior is not None else LONG_MEMORY
        self._tried = [0.0] * len(_START)
        self._right = [0.0] * len(_START)
        self._means: list[float] = [*(prior._means if prior is not None else _START)]

    def observe(self, place: int, said: float | None, right: bool) -> None:
        """The token at `place`, which was `said` to be so likely, was right or not; those before it were right.

        The prior hears it too.
        """
        kinds = (_kind(place, None),) if said is None else (_kind(place, None), _kind(place, said))
        for one in (self,) if self._prior is None else (self._prior, self):
            for kind in kinds:
                one._learn(kind, right)

    def _learn(self, kind: int, right: bool) -> None:
        self._tried[kind] = self._tried[kind] * self._memory + 1.0
        self._right[kind] = self._right[kind] * self._memory + right
        self._estimate(kind)
        if self._prior is None and kind < PLACES:  # a place that was hardly ever reached is taken to be like the last
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

    def chance(self, place: int, said: float | None = None) -> float:
        """From 0 to 1, of the token at `place`, from 0 on."""
        kind = _kind(place, said)
        if self._prior is not None and not self._tried[kind]:  # the prior, as of now, knows best
            return self._prior.chance(place, said)
        mean, seen = self._means[kind], self._tried[kind]
        if not seen and self._prior is None:
            return mean
        return max(0.0, mean - DOUBT * sqrt(mean * max(0.0, 1.0 - mean) / (seen + BELIEF + 1.0)))

    def curve(self, length: int, said: Sequence[float] = ()) -> list[float]:
        """For each token of a draft the chance that it and all before it are right, as far as it is worth a look;
        `said` is how likely the speculator thinks each, if it can tell."""
        if not length:
            return []
        together = self.chance(0, said[0] if said else None)  # doubted here, and not again for each token
        curve = [together] if together >= FAINT else []
        means, tried = self._means, self._tried
        before = means if self._prior is None else self._prior._means
        for place in range(1, length) if curve else ():
            kind = _kind(place, said[place]) if said else min(place, PLACES - 1)
            together *= means[kind] if tried[kind] else before[kind]
            if together < FAINT:
                break
            curve.append(together)
        return curve


def _kind(place: int, said: float | None) -> int:
    """Which tokens one counts among: those that were said to be as likely, or else those of its place."""
    return min(place, PLACES - 1) if said is None else PLACES + bisect_right(LEVELS, said)
