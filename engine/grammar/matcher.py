"""Where one text is in its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from engine.grammar.forms import GrammarError

Bits = NDArray[np.uint32]
"""Masks, [rows, words]: bit b of word w says whether token 32 w + b is permitted."""


ASTRAY = 4
"""Times that guesses may make a matcher begin again, which takes all its tokens once more; then there are none."""


class Matcher:
    """A function of the tokens it took, so nothing ever needs to be taken back. Belongs to the engine thread."""

    def __init__(self, start: LLMatcher, ends: frozenset[int], failed: Callable[[], None]) -> None:
        """`start` is where texts begin, and stays there; `ends` are the tokens that end a text. `failed` is called when
        the grammar cannot be followed further."""
        self.native = start.deep_copy()
        self._start = start
        self._taken: list[int] = []
        self._recovered = 0
        self._ends = ends
        self._failed = failed

    def take(self, token: int) -> None:
        """The text goes on with `token`, which a mask permitted and which does not end it. Raises GrammarError if
        the grammar cannot be followed any further."""
        if not self.native.consume_token(token):
            self.check()
            raise GrammarError(f"the grammar does not permit token {token}")
        self._taken.append(token)

    def recover(self) -> bool:
        """Whether something went wrong since the last token was taken; then it is again where that led.

        The native matcher never leaves an error, and it may be one of a guess that came to where nothing can follow, or
        that cannot be taken back: with `max_tokens` or `stop` in a grammar none can.
        """
        if not self.native.is_error():
            return False
        self._recovered += 1
        self.native = self._start.deep_copy()
        self.native.consume_tokens(self._taken)
        return True

    def check(self) -> None:
        """Raises GrammarError if the grammar turned out to be too complex to follow."""
        if self.native.is_error():
            self._failed()
            raise GrammarError(self.native.get_error().partition("\n")[0])

    @property
    def complete(self) -> bool:
        """Whether the text is whole, and nothing can follow."""
        return self.native.is_stopped()

    def permits(self, draft: Sequence[int]) -> int:
        """How many tokens from the start of `draft` may come one after the other. One that ends the text is not
        counted: no row after it would be used."""
        if self._recovered >= ASTRAY:
            return 0
        tokens = [*draft]
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self.native.validate_tokens(tokens[:end])

    def forced(self, most: int) -> list[int]:
        """The next tokens as far as there is no other, at most `most`. Where a text is forced, masks permit only the
        tokens in which it is usually written."""
        tokens = self.native.compute_ff_tokens()[:most]
        return tokens[: self.permits(tokens)]


def empty(rows: int, size: int) -> Bits:
    """Room for masks over `size` tokens."""
    return np.empty((rows, (size + 31) // 32), np.uint32)


def fill(bits: Bits, wants: list[tuple[LLMatcher, int, list[int]]]) -> None:
    """Writes for each matcher, from its row on, the mask of where it is, and then those after each token of its draft.

    Works on several cores, without Python's lock.
    """
    rows, words = bits.shape
    place = bits.ctypes.data, words * bits.itemsize, rows
    if drafts := [want for want in wants if want[2]]:
        _executor().unsafe_compute_mask_ptr_with_draft_token(drafts, *place)
    if plain := [(native, row) for native, row, draft in wants if not draft]:
        _executor().unsafe_compute_mask_ptr(plain, *place)


@cache
def _executor() -> LLExecutor:
    return LLExecutor()
