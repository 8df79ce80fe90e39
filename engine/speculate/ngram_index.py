"""An index of the n-grams of one history, and the base class of the proposers that copy from the history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

from engine.speculate.proposer import NO_DRAFT, Draft


class NgramIndex:
    """A history of token ids and the earlier occurrences of its last `size` tokens.

    Only n-grams with a token after them count as occurrences, so a look-up of the last n-gram never returns the n-gram
    itself. Keys are 64-bit keyed hashes: the index takes about 110 bytes per token for any `size`, and no client can
    construct a collision.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.history = array("i")
        self._latest: dict[int, int] = {}
        # For each start of an n-gram, the previous start of an equal n-gram, or -1.
        self._previous = array("i")

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends `tokens` to the history."""
        self.history.extend(tokens)
        latest, previous = self._latest, self._previous
        for start, key in enumerate(self._keys(len(previous)), len(previous)):
            previous.append(latest.get(key, -1))
            latest[key] = start

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens, in time proportional to the number of removed tokens."""
        first = max(0, length - self.size)
        for key, earlier in zip(reversed(self._keys(first)), reversed(self._previous[first:]), strict=True):
            if earlier >= 0:
                self._latest[key] = earlier
            else:
                del self._latest[key]
        del self._previous[first:], self.history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep`. N-grams that span the gap are indexed."""
        moved = self.history[keep + discard :]
        self.truncate(keep)
        self.extend(moved)

    def key(self) -> int:
        """Returns a hash of the last n-gram, or of the whole history if it is shorter than an n-gram."""
        return hash(self.history[-self.size :].tobytes())

    def occurrences(self, limit: int, min_following: int = 1) -> list[int]:
        """Returns the positions after at most `limit` earlier occurrences of the last n-gram, latest first.

        Each returned position has at least `min_following` tokens of the history from there on.
        """
        found: list[int] = []
        start, last = self._latest.get(self.key(), -1), len(self.history) - self.size - min_following
        while start >= 0 and len(found) < limit:
            if start <= last:
                found.append(start + self.size)
            start = self._previous[start]
        return found

    def continuation(self, start: int, length: int) -> array[int]:
        """Returns `length` tokens of the history from position `start` on.

        At the end of the history the copy continues with its own beginning, as in LZ77 (Ziv, Lempel 1977), so a
        periodic history is continued with its period.
        """
        copied = self.history[start : start + length]
        if len(copied) < length:
            copied *= -(-length // len(copied))
            del copied[length:]
        return copied

    def _keys(self, first: int) -> list[int]:
        """Returns the keys of the n-grams that start at `first` or later and have a token after them."""
        item = self.history.itemsize
        data, width = self.history[first:].tobytes(), self.size * item
        return [hash(data[at : at + width]) for at in range(0, len(data) - width, item)]


class NgramProposer(ABC):
    """Drafts from the earlier occurrences of the last `size_n` tokens in the request's own history.

    A draft has at most `size_m` tokens and no chances. With fewer than `min_hits` earlier occurrences it is empty. The
    three numbers are at least 1.
    """

    def __init__(self, size_n: int = 12, size_m: int = 48, min_hits: int = 1) -> None:
        self.size_m = size_m
        self.min_hits = min_hits
        self.index = NgramIndex(size_n)

    def begin(self, tokens: Sequence[int]) -> None:
        """Indexes the prompt."""
        self.index.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """Returns a draft of at most `limit` and `size_m` tokens."""
        if len(self.index.occurrences(self.min_hits)) < self.min_hits:
            return NO_DRAFT
        tokens = self._draft(min(limit, self.size_m))
        return Draft(tokens) if tokens else NO_DRAFT

    @abstractmethod
    def _draft(self, length: int) -> array[int]:
        """Returns a draft of at most `length` tokens. Called only if there are `min_hits` earlier occurrences."""

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Indexes `emitted`."""
        self.index.extend(emitted)

    def truncate(self, length: int) -> None:
        """Removes all but the first `length` tokens from the index."""
        self.index.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """Removes the `discard` tokens after the first `keep` from the index."""
        self.index.shift(keep, discard)

    def end(self) -> None:
        """Frees the history."""
        self.index = NgramIndex(self.index.size)
