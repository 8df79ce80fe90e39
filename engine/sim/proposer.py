"""A proposer that knows the output of the simulated model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sim.words import MASK, MIX, STEP, WORD, WORDS, following
from engine.speculate import Draft

# Tokens of a draft at most.
LONGEST = 16
COUNT = len(WORDS)
# The bits of a hash that decide whether a draft token is right.
BITS = 2**16 - 1


class SimProposer:
    """Drafts the output of the simulated model, with chance `accept` of being right at each token."""

    def __init__(self, seed: int, accept: float) -> None:
        self._accept = accept
        self._tokens = array("i")
        self._hashes = array("Q", (seed,))  # of none, one, two ... tokens

    def begin(self, tokens: Sequence[int]) -> None:
        """Takes the history."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns the next words, some of them replaced by wrong ones; the words after a wrong one are not affected."""
        known, words, below = self._hashes[-1], list[int](), self._accept * BITS
        for _ in range(min(limit, LONGEST)):
            mixed = (known ^ known >> 31) * MIX & MASK
            drawn = mixed >> 40
            words.append(WORD + (drawn if (mixed >> 16 & BITS) < below else drawn + 1) % COUNT)
            # `following` inlined: the call would take half the time.
            known = (known * STEP + WORD + drawn % COUNT + 1) & MASK
        return Draft(words)

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends to the history."""
        self._tokens.extend(emitted)
        for token in emitted:
            self._hashes.append(following(self._hashes[-1], token))

    def truncate(self, length: int) -> None:
        """Cuts the history."""
        del self._tokens[length:], self._hashes[length + 1 :]

    def shift(self, keep: int, discard: int) -> None:
        """Removes a part of the history; the hashes are those of the remaining tokens."""
        rest = self._tokens[keep + discard :]
        self.truncate(keep)
        self.observe(rest)

    def end(self) -> None:
        """Does nothing: there is nothing to learn."""
