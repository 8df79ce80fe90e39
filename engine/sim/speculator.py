"""A speculator that knows what the model that computes nothing will say."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sim.words import MASK, MIX, WORD, WORDS, following
from engine.speculate import Draft

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
        known, words = self._hashes[-1], list[int]()
        for _ in range(limit):
            mixed = (known ^ known >> 31) * MIX & MASK
            word = WORD + (mixed >> 40) % len(WORDS)
            right = (mixed >> 16 & BITS) < self._accept * BITS
            words.append(word if right else WORD + (word + 1 - WORD) % len(WORDS))
            known = following(known, word)
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
