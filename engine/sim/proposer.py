"""A proposer that drafts the output of the simulated model with a given acceptance."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from engine.sim.hashing import DRAW_FACTOR, HISTORY_FACTOR, next_hash
from engine.sim.vocab import FIRST_WORD_TOKEN, OUTPUT_WORDS
from engine.speculate import Draft, num_matching
from engine.splitmix import WORD_MASK

_MAX_DRAFT_TOKENS = 16
_WORD_COUNT = len(OUTPUT_WORDS)
# Bits of a hash that determine whether a draft token is correct.
_CHANCE_MASK = 2**16 - 1
# Chance that the second choice is right if the first one is wrong: the mean of a draft model with shared noise, Qwen2.5
# Coder 0.5B for 1.5B, in chat at T = 0, 0.7 and 1 (0.50, 0.42, 0.36).
_SECOND_CHANCE = 0.42


class SimProposer:
    """Implements `engine.speculate.Proposer`. Each draft token is correct with probability `accept`."""

    def __init__(self, seed: int, accept: float) -> None:
        """`seed` is the seed of the simulated model."""
        self._accept = accept
        self._tokens = array("i")
        self._hashes = array("Q", (seed,))  # hash after the first 0, 1, 2 ... tokens
        # The next tokens of the output, their drafts, second choices and the hashes after them, as far as computed.
        self._next: list[int] = []
        self._drafts: list[int] = []
        self._second_choices: list[int] = []
        self._next_hashes: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        """Sets the history to `tokens`."""
        self.observe(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns up to `limit` next words. Some are replaced by wrong words, which do not affect the words after
        them. Of these, some have the right word as the second choice."""
        history, threshold = (self._next_hashes or self._hashes)[-1], self._accept * _CHANCE_MASK
        second_threshold = threshold + _SECOND_CHANCE * (_CHANCE_MASK - threshold)
        length = min(limit, _MAX_DRAFT_TOKENS)
        for _ in range(length - len(self._next)):
            # `draws` and `next_hash` are inlined, as calls would take half of the time.
            mixed = (history ^ history >> 31) * DRAW_FACTOR & WORD_MASK
            drawn, chance = mixed >> 40, mixed >> 16 & _CHANCE_MASK
            word = FIRST_WORD_TOKEN + drawn % _WORD_COUNT
            history = (history * HISTORY_FACTOR + word + 1) & WORD_MASK
            self._next.append(word)
            self._drafts.append(word if chance < threshold else FIRST_WORD_TOKEN + (drawn + 1) % _WORD_COUNT)
            is_second = threshold <= chance < second_threshold
            self._second_choices.append(word if is_second else FIRST_WORD_TOKEN + (drawn + 2) % _WORD_COUNT)
            self._next_hashes.append(history)
        return Draft(self._drafts[:length], (), self._second_choices[:length])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history."""
        self._tokens.extend(emitted)
        known = num_matching(self._next, emitted)
        self._hashes.extend(self._next_hashes[:known])
        del self._next[:known], self._drafts[:known], self._second_choices[:known], self._next_hashes[:known]
        if known < len(emitted):
            self._drop_next()
        for token in emitted[known:]:
            self._hashes.append(next_hash(self._hashes[-1], token))

    def _drop_next(self) -> None:
        del self._next[:], self._drafts[:], self._second_choices[:], self._next_hashes[:]

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens."""
        del self._tokens[length:], self._hashes[length + 1 :]
        self._drop_next()

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` tokens, and computes the hashes of the remaining ones
        again."""
        rest = self._tokens[keep + discard :]
        self.truncate(keep)
        self.observe(rest)

    def end(self) -> None:
        """Does nothing, as no statistics are kept after the request."""
