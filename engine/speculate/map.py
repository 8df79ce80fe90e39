"""Guesses from several earlier occurrences of the last few tokens, where they speak with one voice or the most do."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import itemgetter

from engine.speculate.ngrams import NgramProposer

WINDOW = 32
"""How many occurrences are asked, the latest first: enough for a majority, few enough to read them at every step."""
VALUES = 4
"""How many distinct continuations of an n-gram are weighed against each other, the most recent first."""
LEARNED = 4096
"""How many n-grams may have a length of their own, in less than a megabyte; the one learnt longest ago goes first."""


class NgramMapK(NgramProposer):
    """Follows the majority, token by token, of the occurrences that agree with the draft so far.

    Each n-gram has a length of its own, learnt from what became of the drafts after it: a draft that goes wrong
    cuts it to the part that was right, one that is right throughout doubles it, up to `size_m`.
    """

    def __init__(self, size_n: int = 12, size_m: int = 48, min_hits: int = 1) -> None:
        super().__init__(size_n, size_m, min_hits)
        self._lengths: dict[int, int] = {}

    def _guess(self, length: int) -> array[int]:
        length = min(length, self._lengths.get(self.index.key(), length))
        return _majority([self.index.continuation(start, length) for start in self.index.occurrences(WINDOW)])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Indexes `emitted` and learns from what became of the draft."""
        if drafted:
            self._learn(drafted, accepted)
        super().observe(emitted)

    def truncate(self, length: int) -> None:
        """Forgets all from `length` on, and every length it learnt."""
        super().truncate(length)
        self._lengths.clear()

    def shift(self, keep: int, discard: int) -> None:
        """Forgets the `discard` tokens after the first `keep`, and every length it learnt."""
        super().shift(keep, discard)
        self._lengths.clear()

    def _learn(self, drafted: int, accepted: int) -> None:
        """The history still ends where the draft began, so its last n-gram is the one that the draft came from."""
        key = self.index.key()
        length = self._lengths.pop(key, self.size_m)
        # A draft that was right as far as it was verified says nothing against a longer one.
        length = max(length, 2 * drafted) if accepted == drafted else max(1, accepted)
        if length < self.size_m:
            self._lengths[key] = length
        if len(self._lengths) > LEARNED:
            del self._lengths[next(iter(self._lengths))]


class NgramMapK4v(NgramProposer):
    """Drafts the continuation of `size_m` tokens that clearly prevails.

    Of the latest occurrences that have `size_m` tokens after them, the four most recent distinct continuations are
    weighed: one is drafted if it came at least twice as often as the other three together.
    """

    def _guess(self, length: int) -> array[int]:
        history, size = self.index.history, self.size_m
        values = [history[start : start + size] for start in self.index.occurrences(WINDOW, following=size)]
        weighed: list[tuple[int, array[int]]] = []
        while values and len(weighed) < VALUES:
            recent = values[0]
            weighed.append((values.count(recent), recent))
            values = [value for value in values if value != recent]
        count, winner = max(weighed, key=itemgetter(0), default=(0, array("i")))
        others = sum(counted for counted, _ in weighed) - count
        return winner[:length] if count >= 2 * others else array("i")


def _majority(values: Sequence[array[int]]) -> array[int]:
    """At each position the most frequent token of those `values` that agree so far; the first decides a tie.

    The values are of equal length, at least one.
    """
    at = 0
    # The least and the greatest part where any two do: each round drops a value, and agreement costs no round.
    while (low := min(values)) != (high := max(values)):
        at = next(i for i in range(at, len(low)) if low[i] != high[i])
        tokens = [value[at] for value in values]
        prevailing = max(dict.fromkeys(tokens), key=tokens.count)
        values = [value for value in values if value[at] == prevailing]
    return values[0]
