"""Which tokens are permitted at the rows of one step, for all requests that have a grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.grammar.matcher import Bits, Matcher, empty, fill

Permits = Callable[[int], NDArray[np.bool_]]
"""Which tokens row j permits, [vocabulary]; it saw the first j tokens of the draft, which the matcher took by then."""


class Want(NamedTuple):
    """A request whose next step has a row for where its matcher is, and one after each token of `draft`, all of which
    the grammar permits."""

    key: int
    matcher: Matcher
    draft: Sequence[int]


class Masks:
    """The masks of one step at a time, over `size` tokens. Belongs to the engine thread.

    `aside` is for steps that leave the processor alone: masks are then made while the step is computed, else before,
    as cores that are shared with the step would make it much longer.
    """

    def __init__(self, size: int, *, aside: bool = False) -> None:
        self._size = size
        self._bits = empty(0, size)
        self._wants: dict[int, tuple[int, Matcher]] = {}
        self._aside = ThreadPoolExecutor(1, "paceline-masks") if aside else None
        self._made: Future[None] | None = None

    def begin(self, wants: Sequence[Want]) -> None:
        """Makes the masks of the next step; those of the last are gone. Matchers take nothing until `of` was called."""
        self._wait()
        self._wants = {}
        rows = 0
        for want in wants:
            self._wants[want.key] = rows, want.matcher
            rows += len(want.draft) + 1
        if not rows:
            return
        if rows > len(self._bits):
            self._bits = empty(rows, self._size)
        firsts = [first for first, _ in self._wants.values()]
        jobs = [(want.matcher.native, first, [*want.draft]) for first, want in zip(firsts, wants, strict=True)]
        if self._aside is None:
            fill(self._bits, jobs)
        else:
            self._made = self._aside.submit(fill, self._bits, jobs)

    def of(self, key: int) -> Permits | None:
        """The masks of a request's rows, to be asked for in turn; None if it has no grammar. A mask raises GrammarError
        if the grammar cannot be followed up to there, but not if only a draft that is wrong would lead there."""
        if key not in self._wants:
            return None
        self._wait()
        first, matcher = self._wants[key]
        if matcher.recover():
            return lambda row: self._now(matcher)
        return lambda row: unpacked(self._bits[first + row], self._size)

    def _now(self, matcher: Matcher) -> NDArray[np.bool_]:
        """What is permitted where `matcher` is now. Raises GrammarError."""
        bits = empty(1, self._size)
        fill(bits, [(matcher.native, 0, [])])
        matcher.check()
        return unpacked(bits[0], self._size)

    def _wait(self) -> None:
        if self._made is not None:
            made, self._made = self._made, None
            made.result()

    def close(self) -> None:
        """Nothing is called any more."""
        if self._aside is not None:
            self._aside.shutdown()


def unpacked(words: Bits, size: int) -> NDArray[np.bool_]:
    """The bits of one mask as booleans, [size]."""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)
