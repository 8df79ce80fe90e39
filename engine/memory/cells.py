"""Sequence ids and cells: who may use them, who shares them, and what leaves when they run out."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from msgspec import Struct

from engine.backend import Context
from engine.memory.radix import Match, RadixTree

IDLE_STEPS = 512
"""Steps for which an idle sequence is kept. Every resident cell makes every step dearer; after about so many steps it
has cost what computing its token again would (2 cores, 8 streams: 19 us a step against 9 ms), so that keeping it
longer is the worse bet, as renting is beyond the price of buying. No step, no cost: an engine at rest keeps all."""


class Prefix(Struct, frozen=True):
    """What a prompt would find: `length` tokens of it are resident, `idle` of them held by no running request."""

    seq: int
    length: int
    idle: int


class Lease:
    """The right to one sequence, from `Cells.claim` until `leave`. `length` tokens of it are computed."""

    def __init__(self, cells: Cells, seq: int, shared: int) -> None:
        self._cells = cells
        self.seq = seq
        self.shared = shared
        """Tokens that were resident when it was claimed."""
        self.length = shared

    def commit(self, tokens: Sequence[int]) -> None:
        """Records `tokens`, which the last decode computed, as the sequence's next."""
        self._cells.tree.extend(self.seq, tokens)
        self.length += len(tokens)

    def roll_back(self) -> None:
        """Frees the cells of rows that were computed but not committed."""
        self._cells.context.cut(self.seq, self.length)

    def leave(self, *, keep: bool = True) -> None:
        """Gives the sequence back. With `keep` its prefix stays resident until the cells are needed."""
        self._cells.release(self.seq, keep=keep)


class Cells:
    """The cells of one context.

    A sequence id is free, leased, or idle: finished, and kept because a later prompt may begin like it. Idle ones
    leave in the order in which they were last of use: when their cells or ids are needed, and after `IDLE_STEPS` steps.
    One whose every cell another sequence holds too is not kept.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tree = RadixTree()
        self._free = list(range(context.sequences - 1, -1, -1))
        self._idle: dict[int, int] = {}  # to the step of their last use, oldest first
        self._step = 0
        self._idle_cells: int | None = 0  # None: to be counted again

    @property
    def free(self) -> int:
        """Cells that nobody holds."""
        return self.context.cells - self.tree.cells - self.context.wasted

    @property
    def idle(self) -> int:
        """Cells that no running request holds: what `reclaim` can free, so none if they must stay in order."""
        return 0 if self.context.ordered else self.kept

    @property
    def kept(self) -> int:
        """Cells of idle sequences that no running request holds."""
        if self._idle_cells is None:
            idle = self._idle.keys()
            self._idle_cells = sum(size for size, holders in self.tree.runs() if holders <= idle)
        return self._idle_cells

    def find(self, tokens: array[int], salt: str) -> Prefix:
        """The longest resident prefix of `tokens`, the last of them excluded: one row must be computed."""
        if not self.context.partial:
            return Prefix(-1, 0, 0)
        match = self.tree.match(tokens[:-1], salt)
        return Prefix(match.seq, match.length, self._idle_part(match))

    def _idle_part(self, match: Match) -> int:
        if not match.length or self.context.ordered:
            return 0
        runs = self.tree.holders(match.seq, match.length)
        return sum(size for size, holders in runs if holders <= self._idle.keys())

    def claim(self, tokens: array[int], salt: str) -> Lease:
        """A sequence that begins with the longest resident prefix of `tokens`.

        There is always one: an idle sequence leaves if no id is free, and no more are leased than slots exist.
        """
        prefix = self.find(tokens, salt)
        seq = self._take_id(keep=prefix.seq)
        self._idle_cells = None
        if prefix.length and self.context.copy(prefix.seq, seq, prefix.length):
            self.tree.share(prefix.seq, seq, prefix.length)
            self._refresh(prefix.seq)
            return Lease(self, seq, prefix.length)
        self.tree.begin(seq, salt)
        return Lease(self, seq, 0)

    def _take_id(self, keep: int) -> int:
        if not self._free:
            self._evict(next(seq for seq in self._idle if seq != keep))
        return self._free.pop()

    def _refresh(self, seq: int) -> None:
        """Marks an idle sequence as of use just now, or drops it if its user holds all of it."""
        if seq not in self._idle:
            return
        if self.tree.redundant(seq):
            self._evict(seq)
        else:
            del self._idle[seq]
            self._idle[seq] = self._step

    def release(self, seq: int, *, keep: bool) -> None:
        """Ends a lease: the sequence is idle, or free if nothing is gained by keeping it."""
        self._idle[seq] = self._step
        self._idle_cells = None
        keep = keep and self.context.partial
        if not keep or not self.tree.length(seq) or self.tree.redundant(seq):
            self._evict(seq)

    def reclaim(self, wanted: int) -> None:
        """Lets idle sequences leave, the longest unused first, until `wanted` cells are free or none is idle."""
        while not self.context.ordered and self.free < wanted and self._idle:
            self._evict(next(iter(self._idle)))

    def age(self) -> None:
        """Counts a step, and lets leave what was of no use for too many."""
        self._step += 1
        if self.context.ordered:
            return
        while self._idle and self._step - next(iter(self._idle.values())) > IDLE_STEPS:
            self._evict(next(iter(self._idle)))

    def clear(self) -> None:
        """Lets every idle sequence leave and frees what was wasted. Nothing is leased."""
        while self._idle:
            self._evict(next(iter(self._idle)))
        self.context.clear()

    def _evict(self, seq: int) -> None:
        del self._idle[seq]
        self._idle_cells = None
        self.context.cut(seq, 0)
        self.tree.remove(seq)
        self._free.append(seq)

    def check(self) -> None:
        """Raises AssertionError unless the tree is sound and the context's sequences are as long as it says."""
        self.tree.check()
        for seq in range(self.context.sequences):
            known = self.tree.length(seq) if seq in self.tree else 0
            found = self.context.length(seq)
            assert found == known, f"sequence {seq} has {found} positions, the tree says {known}"
