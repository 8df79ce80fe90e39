"""What is kept in one tier, and what leaves it when its bytes run out.

GreedyDual (Young 1994; Cao and Irani 1997, "Cost-aware WWW proxy caching algorithms"): each item is worth the shelf's
clock at its last use plus what it costs to make again per byte; the item that is worth least leaves, and the clock
goes on to its worth. With equal costs that is the order of last use.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

from engine.memory.pieces import Piece

STALE = 4
"""Entries in the heap for each item, above which the outdated ones are thrown away."""


class Shelf:
    """At most `most` bytes of pieces. A piece never leaves before the pieces that follow it."""

    def __init__(self, most: int, *, whole: bool = False) -> None:
        """With `whole` each piece stands for all of a text up to its end."""
        self.most = most
        self._whole = whole
        self.bytes = 0
        self._sizes: dict[Piece, int] = {}
        self._entries: dict[Piece, tuple[float, int]] = {}  # what it is worth, and a number that orders equal ones
        self._followers: dict[Piece, int] = {}
        self._heap: list[tuple[float, int, Piece]] = []
        self._number = count()
        self._clock = 0.0

    def __contains__(self, piece: Piece) -> bool:
        return piece in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, piece: Piece, size: int) -> None:
        """Keeps `size` bytes of `piece`, as of use now. May exceed `most`: see `pop`."""
        assert piece not in self._sizes, "kept once"
        self._sizes[piece] = size
        self.bytes += size
        if piece.parent is not None:
            self._followers[piece.parent] = self._followers.get(piece.parent, 0) + 1
        self.touch(piece)

    def resize(self, piece: Piece, size: int) -> None:
        """Corrects the bytes of `piece`."""
        self.bytes += size - self._sizes[piece]
        self._sizes[piece] = size

    def touch(self, piece: Piece) -> None:
        """Marks `piece` as of use now."""
        cost = piece.end if self._whole else piece.cost
        self._entries[piece] = self._clock + cost / max(1, self._sizes[piece]), next(self._number)
        self._push(piece)

    def _push(self, piece: Piece) -> None:
        heappush(self._heap, (*self._entries[piece], piece))
        if len(self._heap) > STALE * len(self._sizes) + STALE:
            self._heap = [(*entry, piece) for piece, entry in self._entries.items()]
            heapify(self._heap)

    def pop(self) -> Piece | None:
        """Takes out what is worth least, if more than `most` bytes are kept."""
        while self.bytes > self.most and self._heap:
            worth, number, piece = heappop(self._heap)
            if self._entries.get(piece) != (worth, number) or self._followers.get(piece):
                continue  # of use since, or to be pushed again with its last follower's leaving
            self._clock = max(self._clock, worth)  # one that others followed may be worth less than those
            self.remove(piece)
            return piece
        return None

    def remove(self, piece: Piece) -> None:
        """Takes `piece` out."""
        self.bytes -= self._sizes.pop(piece)
        del self._entries[piece]
        parent = piece.parent
        if parent is None:
            return
        self._followers[parent] -= 1
        if not self._followers[parent]:
            del self._followers[parent]
            if parent in self._sizes:
                self._push(parent)
