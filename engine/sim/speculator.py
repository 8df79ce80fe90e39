"""A speculator that knows what the model that computes nothing will say."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sim.words import MASK, MIX, STEP, WORD, WORDS, following
from engine.speculate import Draft

LONGEST = 16
"""Tokens of a draft at most."""
COUNT = len(WORDS)
BITS = 2**16 - 1
"""Of a hash, those that say whether a guess is right."""


class SimSpeculator:
    """Knows what the model will say, and is right with chance `accept` at each token."""

    def __init__(self, seed: int, accept: float) -> None:
        self._accept = accept
        self._tokens = array("i")
        self._hashes = array("Q", (seed,))  # of none, one, two ... tokens

    def begin(self, tokens: Sequence[int]) -> None:
        """The history."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """The words to come, with another one in the place of some; it goes on after the one that is wrong."""
        known, words, below = self._hashes[-1], list[int](), self._accept * BITS
        for _ in range(min(limit, LONGEST)):
            mixed = (known ^ known >> 31) * MIX & MASK
            drawn = mixed >> 40
            words.append(WORD + (drawn if (mixed >> 16 & BITS) < below else drawn + 1) % COUNT)
            known = (known * STEP + WORD + drawn % COUNT + 1) & MASK  # as `following`, which would take half the time
        return Draft(words)

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """More of the history."""
        self._tokens.extend(emitted)
        for token in emitted:
            self._hashes.append(following(self._hashes[-1], token))

    def truncate(self, length: int) -> None:
        """Less of it."""
        del self._tokens[length:], self._hashes[length + 1 :]

    def shift(self, keep: int, discard: int) -> None:
        """What is left is another text."""
        rest = self._tokens[keep + discard :]
        self.truncate(keep)
        self.observe(rest)

    def end(self) -> None:
        """Nothing is learnt."""
