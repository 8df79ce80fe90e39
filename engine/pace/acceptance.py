"""How likely the tokens of a speculator's drafts are right, learnt from every draft."""

from __future__ import annotations

PLACES = 16
"""Places in a draft that are told apart; those after them count as the last."""
MEMORY = 0.95
"""What an observation is still worth after the next one of its place: about twenty of them count."""
BELIEF = 2.0
"""Observations that the prior is worth."""
HOPE = 0.7
"""The chance of a token of which nothing is known: enough to be tried."""


class Acceptance:
    """The chance that a draft's token at some place is right if those before it were.

    `prior` is what to believe before there are observations: the same of the whole engine, as of when a request came.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._tried = [0.0] * PLACES
        self._right = [0.0] * PLACES
        self._chances: list[float] = [*prior._chances] if prior else [HOPE] * PLACES

    def observe(self, compared: int, right: int) -> None:
        """Of a draft's tokens the first `right` were right and, if `compared` is more, the next one was wrong.

        The prior hears it too.
        """
        if self._prior is not None:
            self._prior.observe(compared, right)
        told = min(compared, right + 1)
        for place in range(min(told, PLACES - 1)):
            self._learn(place, float(place < right))
        if (last := told - PLACES + 1) > 0:  # all the places from there on are one observation
            self._learn(PLACES - 1, min(last, right - PLACES + 1) / last)

    def _learn(self, place: int, right: float) -> None:
        self._tried[place] = self._tried[place] * MEMORY + 1.0
        self._right[place] = self._right[place] * MEMORY + right
        prior = self._prior._chances[place] if self._prior else HOPE
        self._chances[place] = (self._right[place] + BELIEF * prior) / (self._tried[place] + BELIEF)

    def chance(self, place: int) -> float:
        """From 0 to 1, of the token at `place`, from 0 on."""
        return self._chances[min(place, PLACES - 1)]

    def expected(self, length: int) -> float:
        """Tokens that are likely to be accepted of a draft of `length`."""
        total, reached = 0.0, 1.0
        for chance in self._chances[:length]:
            reached *= chance
            total += reached
        if (more := length - PLACES) > 0:
            total += reached * (more if chance == 1.0 else chance * (1.0 - chance**more) / (1.0 - chance))
        return total
