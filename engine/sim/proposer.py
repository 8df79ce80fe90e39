"""A proposer that computes the output of the simulated model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sim.hashing import DRAW_FACTOR, HISTORY_FACTOR, next_hash
from engine.sim.vocab import FIRST_WORD_TOKEN, OUTPUT_WORDS
from engine.speculate import Draft
from engine.splitmix import WORD_MASK

_MAX_DRAFT_TOKENS = 16
_WORD_COUNT = len(OUTPUT_WORDS)
# Bits of a hash that decide whether a draft token is right.
_CHANCE_MASK = 2**16 - 1


class SimProposer:
    """Implements `engine.speculate.Proposer`: each draft token is right with chance `accept`."""

    def __init__(self, seed: int, accept: float) -> None:
        """`seed` is that of the simulated model."""
        self._accept = accept
        self._tokens = array("i")
        self._hashes = array("Q", (seed,))  # after 0, 1, 2 ... tokens

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns the next words, some replaced by wrong ones; a wrong word does not affect the words after it."""
        history, words, threshold = self._hashes[-1], list[int](), self._accept * _CHANCE_MASK
        for _ in range(min(limit, _MAX_DRAFT_TOKENS)):
            # `draws` and `next_hash` inlined: the calls would take half the time.
            mixed = (history ^ history >> 31) * DRAW_FACTOR & WORD_MASK
            drawn = mixed >> 40
            right = (mixed >> 16 & _CHANCE_MASK) < threshold
            words.append(FIRST_WORD_TOKEN + (drawn if right else drawn + 1) % _WORD_COUNT)
            history = (history * HISTORY_FACTOR + FIRST_WORD_TOKEN + drawn % _WORD_COUNT + 1) & WORD_MASK
        return Draft(words)

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history."""
        self._tokens.extend(emitted)
        for token in emitted:
            self._hashes.append(next_hash(self._hashes[-1], token))

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens."""
        del self._tokens[length:], self._hashes[length + 1 :]

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` and hashes the tokens after them anew."""
        rest = self._tokens[keep + discard :]
        self.truncate(keep)
        self.observe(rest)

    def end(self) -> None:
        """Does nothing: no statistics outlive the request."""
