"""Where each n-gram of a history occurs, and what the proposers that copy from the history itself have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence

from engine.speculate.base import NO_DRAFT, Draft


class NgramIndex:
    """A history of token ids and every earlier place of its last `size` tokens.

    An n-gram counts as an occurrence once a token follows it, so the last one never finds itself. Keys are 64-bit
    keyed hashes: about 110 bytes a token however long the n-grams are, and nobody's text can make two collide.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.history = array("i")
        self._latest: dict[int, int] = {}
        # For each start of an n-gram the start before with the same n-gram, -1 if there is none.
        self._before = array("i")

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds `tokens` at the end of the history."""
        self.history.extend(tokens)
        latest, before = self._latest, self._before
        for start, key in enumerate(self._keys(len(before)), len(before)):
            before.append(latest.get(key, -1))
            latest[key] = start

    def truncate(self, length: int) -> None:
        """Only the first `length` tokens are left; costs as much as adding the others did."""
        first = max(0, length - self.size)
        for key, earlier in zip(reversed(self._keys(first)), reversed(self._before[first:]), strict=True):
            if earlier >= 0:
                self._latest[key] = earlier
            else:
                del self._latest[key]
        del self._before[first:], self.history[length:]

    def shift(self, keep: int, discard: int) -> None:
        """Takes out the `discard` tokens after the first `keep`; n-grams of what was not adjacent before are found."""
        moved = self.history[keep + discard :]
        self.truncate(keep)
        self.extend(moved)

    def key(self) -> int:
        """Stands for the last n-gram, or for the whole history if that is shorter."""
        return hash(self.history[-self.size :].tobytes())

    def occurrences(self, most: int, following: int = 1) -> list[int]:
        """Where the history went on after its last n-gram, latest first: at most `most` positions in it.

        Only those with at least `following` tokens from there to the end.
        """
        found: list[int] = []
        start, last = self._latest.get(self.key(), -1), len(self.history) - self.size - following
        while start >= 0 and len(found) < most:
            if start <= last:
                found.append(start + self.size)
            start = self._before[start]
        return found

    def continuation(self, start: int, length: int) -> array[int]:
        """`length` tokens of the history from `start` on, which is in it.

        Past the end it goes on with what was just copied, as LZ77 (Ziv, Lempel 1977) does: a periodic text is
        continued periodically.
        """
        copied = self.history[start : start + length]
        if len(copied) < length:
            copied *= -(-length // len(copied))
            del copied[length:]
        return copied

    def _keys(self, first: int) -> list[int]:
        """Of the n-grams that a token follows, the keys of those that start at `first` or later."""
        item = self.history.itemsize
        data, width = self.history[first:].tobytes(), self.size * item
        return [hash(data[at : at + width]) for at in range(0, len(data) - width, item)]


class NgramProposer(ABC):
    """A proposer that continues its history as an earlier occurrence of the last `size_n` tokens went on.

    Drafts at most `size_m` tokens, and none before those `size_n` have occurred `min_hits` times earlier; each of
    the three is at least 1. Its drafts have no chances.
    """

    def __init__(self, size_n: int = 12, size_m: int = 48, min_hits: int = 1) -> None:
        self.size_m = size_m
        self.min_hits = min_hits
        self.index = NgramIndex(size_n)

    def begin(self, tokens: Sequence[int]) -> None:
        """Indexes the first tokens."""
        self.index.extend(tokens)

    def propose(self, limit: int) -> Draft:
        """At most `limit` and `size_m` tokens."""
        if len(self.index.occurrences(self.min_hits)) < self.min_hits:
            return NO_DRAFT
        tokens = self._guess(min(limit, self.size_m))
        return Draft(tokens) if tokens else NO_DRAFT

    @abstractmethod
    def _guess(self, length: int) -> array[int]:
        """At most `length` tokens that may come next, given that there is an earlier occurrence."""

    def observe(self, emitted: Sequence[int], drafted: int = 0, accepted: int = 0) -> None:
        """Indexes `emitted`; what became of the draft makes no difference."""
        self.index.extend(emitted)

    def truncate(self, length: int) -> None:
        """Forgets all from `length` on."""
        self.index.truncate(length)

    def shift(self, keep: int, discard: int) -> None:
        """Forgets the `discard` tokens after the first `keep`."""
        self.index.shift(keep, discard)

    def end(self) -> None:
        """Lets go of the history, which is most of what it holds."""
        self.index = NgramIndex(self.index.size)
