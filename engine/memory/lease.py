"""What a prompt finds, and the right to a sequence."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from msgspec import Struct

from engine.memory.pieces import Found, Piece

GIVE_UP = 10.0
"""Seconds after which a disk that does not answer is not waited for."""
STOPS = 4
"""Lengths at which all of one text is saved, at once at most: each takes as long as the text is, and ends a step."""
AHEAD = 8
"""Pieces that are read from disk ahead of their loading."""


class Lender(Protocol):
    """Where leases come from and where what is done with them is carried out."""

    def commit(self, lease: Lease, tokens: Sequence[int]) -> None:
        """Records the next tokens of the sequence."""

    def roll_back(self, lease: Lease) -> bool:
        """Frees the cells after its length; whether it can be gone on from there."""

    def fetch(self, pieces: Sequence[Piece], *, wait: bool) -> bool:
        """Begins to read pieces from disk; whether the first is there."""

    def restore(self, lease: Lease) -> bool:
        """Loads its next piece."""

    def release_pieces(self, pieces: Sequence[Piece]) -> None:
        """Nobody waits for these any more."""

    def release(self, seq: int, *, keep: bool) -> None:
        """Takes the sequence back."""


class Prefix(Struct, frozen=True):
    """What a prompt would find: `length` tokens of it are resident, `idle` of them held by no running request; the
    pieces in `stored` continue them."""

    seq: int
    length: int
    idle: int
    stored: Found

    @property
    def reach(self) -> int:
        """Tokens that need no computing."""
        return max(self.length, self.stored.length)


class Coming(NamedTuple):
    """A piece to be loaded when a lease has `start` tokens, after which it has `end`.

    If `shift` is a number it was computed after another text, for positions so many before these.
    """

    piece: Piece
    start: int
    end: int
    shift: int | None = None


class Lease:
    """The right to one sequence, from `Cells.claim` until `leave`. `length` tokens of it are in cells."""

    def __init__(self, lender: Lender, seq: int, shared: int, coming: Sequence[Coming] = ()) -> None:
        self._lender = lender
        self.seq = seq
        self.reused = shared
        """Tokens that were not computed for it: resident when it was claimed, or loaded since."""
        self.moved = 0
        """Of these, the ones that were computed for other positions or after another text."""
        self.length = shared
        self.coming = deque(coming)
        """What is to be loaded, in order."""
        self.stops: list[int] = []
        """Lengths, in order, at which all of it is saved, for a model of which no part can be."""
        self._asked: float | None = None  # since when the disk has not answered
        self.saved = shared
        """Tokens that were saved as they came."""

    def ready(self, known: int) -> int:
        """How many of `known` tokens can be computed before the next piece is to be loaded, or all to be saved."""
        if not (self.coming or self.stops):  # as nearly always, and asked for each stream and step
            return known - self.length
        return min([known, *self.stops[:1], *(coming.start for coming in islice(self.coming, 1))]) - self.length

    def stop_at(self, length: int) -> bool:
        """Has all of it saved once it is so long, for others to go on from; False if it is too late for that."""
        ahead = self.coming[-1].end if self.coming else self.length
        if length > ahead and length not in self.stops and len(self.stops) < STOPS:
            insort(self.stops, length)
        return length in self.stops

    def commit(self, tokens: Sequence[int]) -> None:
        """Records `tokens`, which the last decode computed, as the sequence's next."""
        self.length += len(tokens)
        self._lender.commit(self, tokens)

    def roll_back(self) -> bool:
        """Frees the cells of rows that were computed but not committed. False if what is left cannot be gone on
        from: it is to be left without keeping it."""
        return self._lender.roll_back(self)

    def fetch(self, *, wait: bool) -> bool:
        """Whether the next piece can be loaded now; `wait` waits a little if it is being read from disk."""
        if self._lender.fetch([coming.piece for coming in islice(self.coming, AHEAD)], wait=wait):
            self._asked = None
            return True
        self._asked = self._asked or time.monotonic()
        if time.monotonic() - self._asked > GIVE_UP:
            self.expect_nothing()
        return False

    def expect_nothing(self) -> None:
        """Nothing more is loaded: the rest is to be computed."""
        self._lender.release_pieces([coming.piece for coming in self.coming])
        self.coming.clear()

    def restore(self) -> bool:
        """Loads the next piece, once fetched. False if it is gone or finds no cells: the rest is to be computed."""
        return self._lender.restore(self)

    def leave(self, *, keep: bool = True) -> None:
        """Gives the sequence back. With `keep` its prefix stays resident until the cells are needed."""
        self.expect_nothing()
        self._lender.release(self.seq, keep=keep)
