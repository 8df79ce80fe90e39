"""Allocates sequence ids of the context to prompts, and closes gaps among the allocated ids."""

from __future__ import annotations

from engine.backend import Context
from engine.kv.allocation import Match
from engine.kv.eviction import Eviction
from engine.kv.placement import Costs, SlotOption, choose_slot, displacement, move_target, worth_copying
from engine.kv.residents import Residents


class Allocator:
    """The sequence ids of one context. Belongs to the engine thread."""

    def __init__(self, context: Context, residents: Residents, eviction: Eviction, *, offloads: bool) -> None:
        """`offloads` is True if evicted sequences can be restored."""
        self._context = context
        self._residents = residents
        self._tree, self._idle = residents.tree, residents.idle
        self._eviction = eviction
        self._offloads = offloads
        self.costs = Costs()
        self._gap_seconds = 0.0  # estimated seconds of all extra passes since the present gap among allocated ids

    def allocate(self, match: Match, preferred: int | None) -> tuple[int, int]:
        """Allocates an id, with per-slot KV rather the free id `preferred` than another one. Returns the id and the
        number of the prompt's tokens that it holds.

        An id is always available: at most as many ids are allocated as there are slots, and an idle sequence is evicted
        if no id is free.
        """
        # Loading a state that is not divisible replaces all cells of a sequence, so no resident prefix is used.
        length = 0 if match.stored.blocks and not self._context.divisible else match.length
        return self._share(match, length) if self._context.unified else self._take_slot(match, length, preferred)

    def _share(self, match: Match, length: int) -> tuple[int, int]:
        """Unified KV: allocates a free id that shares the cells of the resident prefix."""
        if (seq := self._residents.free_id) < 0:
            self._eviction.evict(seq := self._idle.oldest(but=(match.seq,)))
        if not length or not self._residents.copy(match.seq, seq, match.tokens[:length]):
            length = 0
            self._residents.begin(seq, match.salt)
        self._eviction.use(match.seq)
        return seq, length

    def _take_slot(self, match: Match, length: int, preferred: int | None) -> tuple[int, int]:
        """Per-slot KV: allocates the slot of least cost, which keeps its own prefix of the prompt or gets a copy of the
        longest one."""
        prefix_lengths = self._tree.matches(match.matchable, match.salt, whole=not self._context.partial)
        allocated = self._residents.allocated
        free = (seq for seq in range(self._context.sequences) if seq not in allocated)
        options = [self._option(seq, min(length, prefix_lengths.get(seq, 0))) for seq in free]
        whole = bool(length) and length == self._tree.length(match.seq)
        # A state that is not divisible can only be copied whole.
        copyable = length if self._context.divisible or whole else 0
        option = choose_slot(options, copyable, allocated, self.costs, offloads=self._offloads, preferred=preferred)
        copies = worth_copying(copyable, option.kept, self.costs)
        seq, kept = option.seq, self._eviction.vacate(option.seq, 0 if copies else option.kept)
        if copies and self._residents.copy(match.seq, seq, match.tokens[:length]):
            self._eviction.use(match.seq)
            return seq, length
        if not kept:
            self._residents.begin(seq, match.salt)
        return seq, kept

    def _option(self, seq: int, kept: int) -> SlotOption:
        if seq not in self._tree:
            return SlotOption(seq, 0, 0, 0, 0)
        lost, unsaved = self._tree.length(seq) - kept, self._eviction.unsaved(seq, kept)
        return SlotOption(seq, kept, lost, max(0, unsaved), self._idle.age(seq))

    def close_gap(self) -> tuple[int, int] | None:
        """Per-slot KV: moves an allocated sequence to another id, so that steps take fewer passes. Called once a step.

        Ski-rental rule: the sequence is moved once the extra passes have cost more than the move would. Returns the old
        and the new id; None if no sequence was moved.
        """
        movable = self._context.divisible and not self._context.unified
        found = move_target(self._residents.allocated) if movable else None
        if found is None:
            self._gap_seconds = 0.0
            return None
        source, gap = found
        self._gap_seconds += self.costs.extra_pass
        lost = displacement(self._option(gap, 0), self.costs, offloads=self._offloads)
        if self._gap_seconds <= 2 * self.costs.move * self._tree.length(source) + lost:
            return None
        self._gap_seconds = 0.0
        self._eviction.vacate(gap, 0)
        if not self._residents.copy(source, gap, self._tree.tokens(source)):
            return None
        self._eviction.free(source)
        return source, gap
