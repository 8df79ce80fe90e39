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
        self._seed = self._hash = seed  # hash of no tokens, and of the history
        # A draft token is right if its chance is below the first threshold, its second choice if below the second.
        self._threshold = accept * _CHANCE_MASK
        self._second_threshold = self._threshold + _SECOND_CHANCE * (_CHANCE_MASK - self._threshold)
        self._tokens = array("i")
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
        history = (self._next_hashes or (self._hash,))[-1]
        length = min(limit, _MAX_DRAFT_TOKENS)
        for _ in range(length - len(self._next)):
            # `draws` and `next_hash` are inlined, as calls would take half of the time.
            mixed = (history ^ history >> 31) * DRAW_FACTOR & WORD_MASK
            drawn, chance = mixed >> 40, mixed >> 16 & _CHANCE_MASK
            word = FIRST_WORD_TOKEN + drawn % _WORD_COUNT
            history = (history * HISTORY_FACTOR + word + 1) & WORD_MASK
            self._next.append(word)
            self._next_hashes.append(history)
            draft, second = word, FIRST_WORD_TOKEN + (drawn + 2) % _WORD_COUNT
            if chance >= self._threshold:
                draft = FIRST_WORD_TOKEN + (drawn + 1) % _WORD_COUNT
                second = word if chance < self._second_threshold else second
            self._drafts.append(draft)
            self._second_choices.append(second)
        return Draft(self._drafts[:length], (), self._second_choices[:length])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Appends `emitted` to the history."""
        self._tokens.extend(emitted)
        known = num_matching(self._next, emitted)
        if known:
            self._hash = self._next_hashes[known - 1]
            del self._next[:known], self._drafts[:known], self._second_choices[:known], self._next_hashes[:known]
        if known < len(emitted):
            self._drop_next()
            for token in emitted[known:]:
                self._hash = next_hash(self._hash, token)

    def truncate(self, length: int) -> None:
        """Cuts the history to its first `length` tokens, and computes its hash again."""
        kept, self._tokens, self._hash = self._tokens[:length], array("i"), self._seed
        self._drop_next()
        self.observe(kept)

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` tokens."""
        rest = self._tokens[keep + discard :]
        self.truncate(keep)
        self.observe(rest)

    def _drop_next(self) -> None:
        del self._next[:], self._drafts[:], self._second_choices[:], self._next_hashes[:]

    def end(self) -> None:
        """Does nothing, as no statistics are kept after the request."""
