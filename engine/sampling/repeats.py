"""Lengths of the repeats of the last tokens of a growing history."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# With more new tokens than this the lengths are computed anew: an update takes one pass over the window for each token.
_MAX_NEW_TOKENS = 64
_MIN_CAPACITY = 256


def last_tokens(history: Sequence[int], last_n: int) -> Sequence[int]:
    """Returns the `last_n` most recent tokens of `history`, oldest first. -1 means all tokens."""
    return history if last_n < 0 else history[max(0, len(history) - last_n) :]


class RepeatLengths:
    """For each earlier position, the number of tokens before it that equal the last tokens of the history.

    One update with one new token is one vectorised pass: the match at a distance grows by one if the new token equals
    the token at that distance, and is 0 otherwise. A history that does not continue the previous one is computed anew.
    """

    def __init__(self, window: int, is_breaker: Callable[[int], bool], origin: RepeatLengths | None = None) -> None:
        """`window` is the number of latest tokens, -1 for all. The state of `origin` is copied if the history continues
        that of `origin` and not the previous one."""
        self._window = window
        self._is_breaker = is_breaker
        self._origin = origin
        self._total = 0
        """Tokens of the history."""
        self._size = 0
        """Tokens of the history in the window."""
        self._unbroken = 0
        # The tokens in the window end the first buffer. From the most recent one they begin the second one, before
        # which new tokens are written.
        self._forward = np.zeros(_MIN_CAPACITY, np.int32)
        self._backward = np.zeros(_MIN_CAPACITY, np.int32)
        self._used = 0
        """Tokens in the buffers, those that left the window included."""
        # Matches by their distance from the end. They may reach beyond the window.
        self._lengths = np.zeros(_MIN_CAPACITY, np.int32)

    @property
    def unbroken(self) -> int:
        """Number of tokens after the last breaker in the window."""
        return min(self._unbroken, self._size)

    def continuations(self, shortest: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns the token that follows each match of at least `shortest` tokens in the window, and the lengths."""
        distances = (self._lengths[1 : self._size] >= shortest).nonzero()[0] + 1
        lengths = np.minimum(self._lengths[distances], (self._size - distances).astype(np.int32))
        enough = lengths >= shortest
        return self._recent[distances[enough] - 1], lengths[enough]

    def update(self, history: Sequence[int]) -> None:
        """Updates the lengths to those of `history`."""
        if not self._is_continued(history):
            if self._origin is not None and self._origin._is_continued(history):
                self._copy(self._origin)
            else:
                self._restart(history)
        for token in history[self._total :]:
            self._push(token)

    @property
    def _recent(self) -> NDArray[np.int32]:
        """The tokens in the window, from the most recent one."""
        start = len(self._backward) - self._used
        return self._backward[start : start + self._size]

    def _is_continued(self, history: Sequence[int]) -> bool:
        if not self._size or not 0 <= len(history) - self._total <= _MAX_NEW_TOKENS:
            return False
        known = np.asarray(history[self._total - self._size : self._total], np.int32)
        return np.array_equal(known, self._forward[self._used - self._size : self._used])

    def _copy(self, other: RepeatLengths) -> None:
        self._total, self._unbroken = other._total, other._unbroken
        self._fill(other._recent, other._lengths[: other._size])

    def _restart(self, history: Sequence[int]) -> None:
        tokens = array("i", last_tokens(history, self._window))
        tokens.reverse()
        self._total = len(history)
        self._unbroken = next((at for at, token in enumerate(tokens) if self._is_breaker(token)), len(tokens))
        self._fill(np.asarray(tokens, np.int32), np.asarray(prefix_matches(tokens), np.int32))

    def _fill(self, recent: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """Moves these tokens and lengths to new buffers with room for as many tokens."""
        size = len(recent)
        self._size = self._used = size
        capacity = max(_MIN_CAPACITY, 2 * size)
        self._forward, self._backward, self._lengths = (np.zeros(capacity, np.int32) for _ in range(3))
        self._forward[:size] = recent[::-1]
        self._backward[capacity - size :] = recent
        self._lengths[:size] = lengths

    def _push(self, token: int) -> None:
        if self._used == len(self._forward):
            self._fill(self._recent, self._lengths[: self._size])
        self._forward[self._used] = token
        self._used += 1
        self._backward[-self._used] = token
        self._total += 1
        self._size = self._size + 1 if self._window < 0 else min(self._size + 1, self._window)
        self._unbroken = 0 if self._is_breaker(token) else self._unbroken + 1
        lengths = self._lengths[1 : self._size]
        lengths += 1
        lengths *= self._recent[1:] == token


def prefix_matches(tokens: Sequence[int]) -> list[int]:
    """Returns, for each position, the length of the common prefix of `tokens` and the tokens from there; 0 first.

    The Z-algorithm (Gusfield 1997, section 1.4) takes linear time; koboldcpp and llama.cpp use it for DRY too.

    >>> prefix_matches("cbaycbccba")
    [0, 0, 0, 0, 2, 0, 1, 3, 0, 0]
    """
    total = len(tokens)
    lengths = [0] * total
    # tokens[left:right] is the match with a prefix of tokens, among those found so far, that ends last.
    left = right = 0
    for at in range(1, total):
        if tokens[at] != tokens[0]:
            continue
        length = min(lengths[at - left], right - at) if at < right else 0
        if at + length >= right:
            while at + length < total and tokens[length] == tokens[at + length]:
                length += 1
            left, right = at, at + length
        lengths[at] = length
    return lengths
