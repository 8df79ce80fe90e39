"""Saves and evicts idle sequences: at once when cells are needed, otherwise a few blocks at a time in spare time."""

from __future__ import annotations

import time

from engine.backend import Context, Snapshot
from engine.kv.block import BLOCK_TOKENS
from engine.kv.offloader import Offloader
from engine.kv.placement import Costs
from engine.kv.residents import Residents


class Eviction:
    """The idle sequences of one context. Belongs to the engine thread."""

    def __init__(self, context: Context, residents: Residents, offloader: Offloader) -> None:
        self._context = context
        self._residents = residents
        self._tree, self._idle = residents.tree, residents.idle
        self._offloader = offloader
        # Idle sequences that are not completely saved, each with the position up to which it is saved.
        self._saved_up_to: dict[int, int] = {}
        # The sequence that several calls of `maintain` save, and its snapshot; -1 if there is none.
        self._snapshot: tuple[int, Snapshot | None] = -1, None
        self._budget_seconds = 0.0  # seconds left for evicting and saving; negative after an overrun

    def add(self, seq: int) -> None:
        """Makes the allocated `seq` an idle sequence. Drops it if it is empty or other sequences hold all of its
        cells."""
        if not self._tree.length(seq):
            self._residents.free(seq)
            return
        self._residents.release(seq)
        if self._residents.redundant(seq):
            self.evict(seq)
        elif self._offloader.offload is not None:
            self._saved_up_to[seq] = 0

    def use(self, seq: int) -> None:
        """Marks an idle sequence as used now. Drops it if another sequence holds all of its cells. No effect if `seq`
        is not idle."""
        if seq in self._idle:
            if self._residents.redundant(seq):
                self.evict(seq)
            else:
                self._idle.use(seq)

    def unsaved(self, seq: int, start: int = 0) -> int:
        """Returns the number of tokens of an idle sequence from `start` on that may be unsaved."""
        return self._tree.length(seq) - max(start, self._saved_up_to[seq]) if seq in self._saved_up_to else 0

    def vacate(self, seq: int, keep: int) -> int:
        """Saves and drops the tokens of an idle or free id from `keep` on.

        Returns the number of tokens kept: `keep`, or 0 if the shorter sequence cannot be continued. The id is then
        allocated, or free if no token is kept.
        """
        if seq not in self._tree:
            return 0
        if self.unsaved(seq, keep) > 0:
            self._offloader.save(seq, keep if self._context.divisible else 0)
        if keep and self._cut(seq, keep):
            self._saved_up_to.pop(seq, None)
            self._residents.reallocate(seq)
            return keep
        self.free(seq)
        return 0

    def make_room(self, cells: int, free: int) -> None:
        """Unified KV: evicts the least recently used sequences until `cells` cells are free or no sequence is idle.
        `free` is the number of free cells at the call."""
        before = self._tree.cells
        while self._idle and free + before - self._tree.cells < cells:
            self._shrink(self._idle.oldest(), cells - free - before + self._tree.cells)

    def drop_all(self) -> None:
        """Evicts every idle sequence."""
        while self._idle:
            self.evict(self._idle.oldest())

    def _shrink(self, seq: int, cells: int) -> None:
        """Cuts at least `cells` cells off the end of an idle sequence. Evicts it if it cannot be cut, or if fewer cells
        at its end are its own."""
        length, own = self._tree.length(seq), self._tree.exclusive_tail(seq)
        keep = max(0, (length - cells) // BLOCK_TOKENS * BLOCK_TOKENS)
        if keep <= length - own or not self._context.partial or not self._context.divisible:
            self.evict(seq)
            return
        self._offloader.save(seq, keep)
        if not self._cut(seq, keep):
            self.free(seq)

    def _cut(self, seq: int, length: int) -> bool:
        self._drop_snapshot(seq)
        return self._residents.cut(seq, length)

    def _drop_snapshot(self, seq: int) -> None:
        """Drops the snapshot of `seq`. Called before `seq` changes."""
        if self._snapshot[0] == seq:
            self._snapshot = -1, None

    def evict(self, seq: int) -> None:
        """Drops an idle sequence after saving the part that no other sequence holds."""
        if self._tree.length(seq) and not self._residents.redundant(seq):
            shared = self._tree.length(seq) - self._tree.exclusive_tail(seq)
            self._offloader.save(seq, shared if self._context.divisible else 0)
        self.free(seq)

    def free(self, seq: int) -> None:
        """Drops a sequence without saving it."""
        self._saved_up_to.pop(seq, None)
        self._drop_snapshot(seq)
        self._residents.free(seq)

    def maintain(self, seconds: float, costs: Costs) -> bool:
        """Evicts idle sequences that cost more to keep than to restore, and saves others, for about `seconds`. An
        overrun shortens later calls. Returns True if unsaved idle sequences remain."""
        self._budget_seconds = min(self._budget_seconds + seconds, seconds)
        while self._budget_seconds >= 0 and (self._evict_due(costs) or self._save_next()):
            pass
        return bool(self._saved_up_to)

    def _evict_due(self, costs: Costs) -> bool:
        """Cuts as many blocks as the budget allows off the least recently used sequence. Returns False if no eviction
        is due."""
        offloads = self._offloader.offload is not None
        if not self._context.unified or not self._idle.eviction_due(2 * costs.move if offloads else costs.compute):
            return False
        begun = time.perf_counter()
        cells = BLOCK_TOKENS * self._offloader.blocks_within(self._budget_seconds) if offloads else self._context.cells
        self._shrink(self._idle.oldest(), cells)
        self._budget_seconds -= time.perf_counter() - begun
        return True

    def _save_next(self) -> bool:
        """Saves as many blocks of an idle sequence as the budget allows, so that a later eviction takes no time.
        Returns False if every idle sequence is saved."""
        if not self._saved_up_to:
            return False
        begun = time.perf_counter()
        seq, start = self._saved_up_to.popitem()
        if seq in self._idle and start < self._tree.length(seq):
            if self._snapshot[0] != seq:
                self._snapshot = seq, self._context.save(seq)
            count = self._offloader.blocks_within(self._budget_seconds)
            end = self._offloader.save_some(seq, start, count, self._snapshot[1])
            if end < self._tree.length(seq):
                self._saved_up_to[seq] = end
            else:
                self._drop_snapshot(seq)
        self._budget_seconds -= time.perf_counter() - begun
        return True
