"""`ngram-map-k` and `ngram-map-k4v`: draft the usual continuation of the earlier occurrences of the last n tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import itemgetter

from engine.speculate.ngram_index import NgramProposer

# Maximum number of occurrences, the latest ones, that are compared: more would take too long at each step.
MAX_OCCURRENCES = 32
# Distinct continuations of an n-gram that k4v compares, the most recent first (llama.cpp's four values per key).
MAX_CONTINUATIONS = 4
# Maximum number of n-grams with a learnt draft length; they take less than a megabyte.
MAX_LEARNT_LENGTHS = 4096


class NgramMapKProposer(NgramProposer):
    """Drafts at each position the most frequent token of those occurrences that agree with the draft so far.

    Each n-gram has its own draft length. A rejected token cuts the length to the number of accepted tokens, and full
    acceptance doubles the length, up to `size_m`. The method is llama.cpp's (common/ngram-map.cpp), except that its
    lengths only shrink.
    """

    def __init__(self, size_n: int = 12, size_m: int = 48, min_hits: int = 1) -> None:
        super().__init__(size_n, size_m, min_hits)
        self._lengths: dict[int, int] = {}

    def _draft(self, length: int) -> array[int]:
        length = min(length, self._lengths.get(self.index.key(), length))
        return _majority([self.index.continuation(start, length) for start in self.index.occurrences(MAX_OCCURRENCES)])

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Learns the length of the verified draft and indexes `emitted`."""
        if drafted:
            self._learn(drafted, accepted)
        super().observe(emitted)

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens from the index, and all learnt lengths."""
        super().truncate(length)
        self._lengths.clear()

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` from the index, and all learnt lengths."""
        super().shift(keep, discard)
        self._lengths.clear()

    def _learn(self, drafted: int, accepted: int) -> None:
        # The history still ends where the draft began, so the draft is a continuation of the last n-gram.
        key = self.index.key()
        length = self._lengths.pop(key, self.size_m)
        # The chooser may cut a draft: its full acceptance is no evidence against a longer length.
        length = max(length, 2 * drafted) if accepted == drafted else max(1, accepted)
        if length < self.size_m:
            self._lengths[key] = length
        if len(self._lengths) > MAX_LEARNT_LENGTHS:
            del self._lengths[next(iter(self._lengths))]


class NgramMapK4vProposer(NgramProposer):
    """Drafts the continuation of `size_m` tokens that clearly is the most frequent one.

    The four most recent distinct continuations are counted, among the latest occurrences with `size_m` tokens after
    them. The most frequent continuation is the draft if its count is at least twice that of the other three together.
    The method is llama.cpp's (common/ngram-map.cpp), except that llama.cpp then drafts the last continuation.
    """

    def _draft(self, length: int) -> array[int]:
        history, size = self.index.history, self.size_m
        starts = self.index.occurrences(MAX_OCCURRENCES, min_following=size)
        continuations = [history[start : start + size] for start in starts]
        counted: list[tuple[int, array[int]]] = []
        while continuations and len(counted) < MAX_CONTINUATIONS:
            recent = continuations[0]
            counted.append((continuations.count(recent), recent))
            continuations = [other for other in continuations if other != recent]
        count, winner = max(counted, key=itemgetter(0), default=(0, array("i")))
        others = sum(other for other, _ in counted) - count
        return winner[:length] if count >= 2 * others else array("i")


def _majority(continuations: Sequence[array[int]]) -> array[int]:
    """Returns the sequence with, at each position, the most frequent token of those `continuations` that agree so far.

    Between equally frequent tokens the first continuation decides. There is at least one continuation, and all have the
    same length.
    """
    position = 0
    # The least and the greatest continuation first differ where any two do, so each round drops a continuation.
    while (low := min(continuations)) != (high := max(continuations)):
        position = next(i for i in range(position, len(low)) if low[i] != high[i])
        tokens = [continuation[position] for continuation in continuations]
        prevailing = max(dict.fromkeys(tokens), key=tokens.count)
        continuations = [continuation for continuation in continuations if continuation[position] == prevailing]
    return continuations[0]
