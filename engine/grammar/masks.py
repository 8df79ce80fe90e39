"""Token masks for the rows of one step, for all sequences with a grammar."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens
from numpy.typing import NDArray

from engine.background import run_in_background
from engine.grammar.matcher import Matcher

log = logging.getLogger("paceline.engine")

# Packed masks, [rows, words]. Bit b of word w is 1 if token 32 w + b is permitted.
Bitmasks = NDArray[np.int32]

# A native matcher, the row of its mask, and its draft.
MaskJob = tuple[LLMatcher, int, list[int]]

# Returns the mask of row j, [vocabulary]. Called once the matcher has accepted the first j draft tokens.
RowMasks = Callable[[int], NDArray[np.bool_]]


class MaskRequest(NamedTuple):
    """The rows of one sequence that need masks: one for the matcher's state, and one after each token of `draft`.

    The grammar must permit all tokens of `draft`.
    """

    key: int
    """Key of the sequence."""
    matcher: Matcher
    draft: Sequence[int]


class Masks:
    """The masks of the current step, over a vocabulary of `size` tokens. Belongs to the engine thread.

    With `overlapped`, a thread computes the masks during the step, for steps on a GPU. Otherwise the masks are computed
    before the step, as on a CPU they would compete with the step for cores and make it much longer.
    """

    def __init__(self, size: int, *, overlapped: bool = False) -> None:
        self._size = size
        self._bitmasks = allocate_bitmasks(0, size)
        self._sequences: dict[int, tuple[int, Matcher]] = {}  # first row and matcher of each sequence, by key
        self._thread = ThreadPoolExecutor(1, "paceline-masks", run_in_background) if overlapped else None
        self._running: Future[None] | None = None
        self._is_filled = True  # False after an exception, which has left the rows of `_bitmasks` undefined

    def begin(self, requests: Sequence[MaskRequest]) -> None:
        """Starts computing the masks of the next step. Drops the masks of the last step.

        The matchers of the requests must not change before `of` returns.
        """
        self._wait()
        self._sequences, self._is_filled = {}, True
        rows = 0
        for request in requests:
            self._sequences[request.key] = rows, request.matcher
            rows += len(request.draft) + 1
        if not rows:
            return
        if rows > len(self._bitmasks):
            self._bitmasks = allocate_bitmasks(rows, self._size)
        firsts = [first for first, _ in self._sequences.values()]
        jobs = [(each.matcher.native, first, [*each.draft]) for first, each in zip(firsts, requests, strict=True)]
        if self._thread is None:
            self._fill(jobs)
        else:
            self._running = self._thread.submit(self._fill, jobs)

    def _fill(self, jobs: list[MaskJob]) -> None:
        try:
            fill_bitmasks(self._bitmasks, jobs)
        except Exception:  # of one matcher: `of` computes the masks of the others
            log.exception("the grammar masks of a step cannot be computed together")
            self._is_filled = False

    def of(self, key: int) -> RowMasks | None:
        """Returns a function from rows to masks for the sequence `key`, after waiting for the masks. Returns None if
        the sequence has no grammar.

        The function raises GrammarError if the grammar cannot be followed up to the row. If the native matcher failed
        because of the draft, or the masks of the step could not be computed together, the function computes each mask
        from the accepted tokens instead, and raises the exception of that computation.
        """
        if key not in self._sequences:
            return None
        self._wait()
        first, matcher = self._sequences[key]
        if matcher.recover() or not self._is_filled:
            return lambda row: self._current_mask(matcher)
        return lambda row: unpack_bitmask(self._bitmasks[first + row], self._size)

    def _current_mask(self, matcher: Matcher) -> NDArray[np.bool_]:
        bitmasks = allocate_bitmasks(1, self._size)
        fill_bitmasks(bitmasks, [(matcher.native, 0, [])])
        matcher.check()
        return unpack_bitmask(bitmasks[0], self._size)

    def _wait(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Ends the thread. No method may be called afterwards."""
        if self._thread is not None:
            self._thread.shutdown()


def allocate_bitmasks(rows: int, size: int) -> Bitmasks:
    """Returns uninitialized packed masks for `rows` rows over `size` tokens."""
    return np.empty((rows, (size + 31) // 32), np.int32)


def fill_bitmasks(bitmasks: Bitmasks, jobs: list[MaskJob]) -> None:
    """Writes, for each (matcher, row, draft), the mask of the matcher's state to `row`, and the mask after each draft
    token to the following rows. Uses several cores and releases the GIL."""
    if drafts := [job for job in jobs if job[2]]:
        fill_next_token_bitmask_par_with_draft_tokens(_executor(), drafts, bitmasks)
    if plain := [(matcher, row) for matcher, row, draft in jobs if not draft]:
        fill_next_token_bitmask_par(_executor(), plain, bitmasks)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def unpack_bitmask(words: NDArray[np.int32], size: int) -> NDArray[np.bool_]:
    """Returns one packed mask as booleans, [size]."""
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").view(np.bool_)
