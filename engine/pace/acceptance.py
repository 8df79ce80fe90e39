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

    `prior` is what to believe before there are observations: the same of the whole engine for one request's.
    """

    def __init__(self, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._tried = [0.0] * PLACES
        self._right = [0.0] * PLACES

    def observe(self, compared: int, right: int) -> None:
        """Of a draft's tokens the first `right` were right and, if `compared` is more, the next one was wrong.

        The prior hears it too.
        """
        if self._prior is not None:
            self._prior.observe(compared, right)
        for place in range(min(compared, right + 1)):
            at = min(place, PLACES - 1)
            self._tried[at] = self._tried[at] * MEMORY + 1.0
            self._right[at] = self._right[at] * MEMORY + (place < right)

    def chance(self, place: int) -> float:
        """From 0 to 1, of the token at `place`, from 0 on."""
        at = min(place, PLACES - 1)
        prior = self._prior.chance(at) if self._prior else HOPE
        return (self._right[at] + BELIEF * prior) / (self._tried[at] + BELIEF)

    def expected(self, length: int) -> float:
        """Tokens that are likely to be accepted of a draft of `length`."""
        total, reached = 0.0, 1.0
        for place in range(min(length, PLACES)):
            chance = self.chance(place)
            reached *= chance
            total += reached
        if (more := length - PLACES) > 0:
            total += reached * (more if chance == 1.0 else chance * (1.0 - chance**more) / (1.0 - chance))
        return total
