"""The façade of the KV cache: match, allocate, load, commit, roll back, release, evict.

A sequence id of the context is free, allocated to a running request, or idle: released, but its tokens stay in the
cells, as a later prompt may begin with them. With unified KV idle sequences are evicted when cells or ids are needed,
or once keeping them has cost more than restoring them would: the least recently used sequence first, block by block
from its last block on. With per-slot KV an idle sequence stays in its slot at no cost until the slot is allocated to
another prompt. With offload tiers evicted tokens are saved to the tiers first.

`seq` is a sequence id of the context, and an allocated sequence is also called active.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import islice

from engine.backend import Context
from engine.kv.allocation import (
    Active,
    Allocation,
    BlockToLoad,
    KVStats,
    Loaded,
    Match,
    blocks_to_load,
)
from engine.kv.allocator import Allocator
from engine.kv.block import BLOCK_TOKENS, BlockChain
from engine.kv.block_tree import RECENT_SEQUENCES
from engine.kv.changes import BlockChanges, ChangeSink
from engine.kv.eviction import Eviction
from engine.kv.offload import Offload
from engine.kv.offloader import Offloader
from engine.kv.placement import Costs
from engine.kv.residents import Residents
from engine.kv.reuse import MIN_RUN_TOKENS, NOT_RESIDENT, best_donor, moved_blocks
from engine.kv.transfer import Transfer

# Stands for the number of free cells with per-slot KV, where each slot has all cells that its sequence can need.
UNBOUNDED_CELLS = 2**30


class KVCache:
    """The KV cache of one context. Belongs to the engine thread."""

    def __init__(self, context: Context, offload: Offload | None = None, reuse: int = 0) -> None:
        """`reuse` is the minimum length in tokens of a run that is moved to other positions; 0 disables moving."""
        self._context = context
        self._residents = Residents(context)
        self._tree, self._idle = self._residents.tree, self._residents.idle
        self._offload = offload
        self._offloader = Offloader(context, self._tree, offload)
        self._eviction = Eviction(context, self._residents, self._offloader)
        self._allocator = Allocator(context, self._residents, self._eviction, offloads=offload is not None)
        self._active: dict[int, Active] = {}
        self._changes: BlockChanges | None = None
        self.transfer = Transfer(context, self._residents, self._eviction, offload)
        """Exports, imports and erases sequences, for slot files."""
        self.reuse = max(MIN_RUN_TOKENS, reuse) if reuse and offload is not None and context.shifts else 0
        """Effective minimum length in tokens of a moved run; 0 if no run is moved."""

    @property
    def offloads(self) -> bool:
        """True if evicted prefixes are saved to a tier."""
        return self._offload is not None

    @property
    def divisible(self) -> bool:
        """True if the state of a sequence can be cut into blocks; False if only whole sequences can be saved."""
        return self._context.divisible

    # ── cells ──

    @property
    def free_cells(self) -> int:
        """Number of cells that no sequence holds; `UNBOUNDED_CELLS` with per-slot KV."""
        return self._context.cells - self._tree.cells if self._context.unified else UNBOUNDED_CELLS

    @property
    def evictable_cells(self) -> int:
        """Number of cells that `evict` can free; 0 with per-slot KV."""
        return self._residents.idle_cells if self._context.unified else 0

    @property
    def used_cells(self) -> int:
        """Number of cells that sequences hold, idle ones too."""
        return self._tree.cells

    def exclusive(self, seq: int) -> int:
        """Returns the number of cells that only `seq` holds."""
        return self._tree.exclusive(seq)

    def length(self, seq: int) -> int:
        """Returns the number of tokens of `seq`, all of which are in cells."""
        return self._tree.length(seq)

    # ── matching ──

    @property
    def version(self) -> int:
        """Grows when a sequence is begun, cut, released or reallocated, or a block enters RAM or leaves the tiers. A
        `Match` of an earlier version may be outdated."""
        return self._residents.version + (self._offload.version if self._offload is not None else 0)

    def match(self, tokens: array[int], salt: str, last: Match | None = None) -> Match:
        """Returns the longest known prefix of `tokens`. Returns `last`, an earlier match of the same prompt, if nothing
        changed since."""
        if last is not None and last.version == self.version:
            return last
        matchable = tokens[: -self._context.prefill_rows]
        resident = self._residents.match(matchable, salt)
        idle = self._residents.idle_part(resident) if self._context.unified else 0
        stored = self._stored(matchable, salt, resident.length)
        return Match(tokens, matchable, salt, resident.seq, resident.length, idle, stored, self.version)

    def _stored(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        return BlockChain((), start) if self._offload is None else self._offload.tree.match(tokens, salt, start)

    # ── allocating ──

    def allocate(self, match: Match, preferred: int | None = None, *, keep: bool = True) -> Allocation:
        """Allocates a sequence id that holds the longest resident prefix of the prompt. `load` loads the blocks that
        continue the prefix. Always succeeds, as at most as many ids are allocated as there are slots.

        Without `keep` no block of the sequence is saved while it grows.

        With per-slot KV the prompt displaces the content of the id `preferred`, if it is free, rather than that of
        another id.
        """
        match = self.match(match.tokens, match.salt)  # a running sequence may have grown since, which keeps `version`
        seq, length = self._allocator.allocate(match, preferred)
        matchable = match.matchable
        stored = match.stored if length == match.length else self._stored(matchable, match.salt, length)
        if length and stored.blocks and not self._context.divisible:
            # The slot keeps less than the match, and a stored state is longer: it replaces all cells of the sequence.
            self._residents.begin(seq, match.salt)
            length = 0
        to_load = blocks_to_load(stored, length, divisible=self._context.divisible)
        known = to_load[-1].end if to_load else length
        active = self._active[seq] = Active(deque(to_load + self._moved_blocks(matchable, match.salt, known, but=seq)))
        # Cells leave a sliding window while the sequence grows, so its blocks are saved before, from `cursor` on. The
        # cells of other models stay until an eviction saves them.
        if keep and self._offload is not None and self._context.window and self._context.divisible:
            start = length // BLOCK_TOKENS * BLOCK_TOKENS
            active.cursor = self._offload.tree.pin(matchable[:start], match.salt)
            active.unsaved = matchable[start:length]
        return Allocation(seq, length)

    def _moved_blocks(self, tokens: array[int], salt: str, start: int, but: int) -> list[BlockToLoad]:
        """Returns blocks that were computed at other positions and hold parts of `tokens` from `start` on
        (`--cache-reuse`). Resident blocks of the sequence `but` are not used."""
        if not self.reuse or self._offload is None or len(tokens) - start < self.reuse:
            return []
        latest = islice((seq for seq in self._tree.sequences(salt) if seq != but), RECENT_SEQUENCES)
        candidates = [(seq, self._tree.tokens(seq)) for seq in latest]
        candidates += [(NOT_RESIDENT, stored) for stored in self._offload.tree.recent(tokens, salt)]
        donor = best_donor(tokens, start, self.reuse, candidates)
        # `load` takes states from the tiers only, and the donor may be evicted or grow past its window before.
        if donor.runs and donor.seq != NOT_RESIDENT:
            first, end = donor.runs_span
            self._offloader.save(donor.seq, first, -(-end // BLOCK_TOKENS) * BLOCK_TOKENS)
        blocks = self._offload.tree.blocks_of(donor.tokens, salt)
        return [block for run in donor.runs for block in moved_blocks(run, blocks)]

    # ── running ──

    def ready(self, seq: int, known: int) -> int:
        """Returns how many of the `known` tokens of `seq` can be computed before the next load or save point."""
        return self._active[seq].ready(self._tree.length(seq), known)

    def has_blocks_to_load(self, seq: int) -> bool:
        """Returns True if blocks of the sequence must be loaded, now or after a part of the prefill."""
        return bool(self._active[seq].to_load)

    def loading(self, seq: int) -> bool:
        """Returns True if a block must be loaded before the next token is computed."""
        active = self._active[seq]
        return bool(active.to_load) and active.to_load[0].start == self._tree.length(seq)

    def load(self, seq: int, seconds: float, *, wait: bool) -> Loaded:
        """Loads the next blocks for about `seconds`, in one call with per-slot KV up to `PER_SLOT_LOAD_TOKENS` tokens.
        If a block was evicted or does not fit the cells, the remaining blocks are dropped and their tokens are
        computed. With `wait`, blocks for up to `DISK_WAIT_SECONDS` until the next block has been read from disk."""
        active = self._active[seq]
        self.evict(self._offloader.cells_for(active, seconds))
        return self._offloader.load(seq, active, seconds, wait=wait)

    def commit(self, seq: int, tokens: Sequence[int], *, alternative: bool = False) -> None:
        """Appends `tokens`, which the last decode computed, to the sequence; see `Residents.extend`."""
        self._residents.extend(seq, tokens, alternative=alternative)
        active = self._active[seq]
        if active.save_points and active.pass_save_points(self._tree.length(seq)):
            self._offloader.save(seq)
        if active.cursor is not None:
            active.unsaved.extend(tokens)
            self._offloader.save_grown(seq, active)

    def can_share_at(self, seq: int, length: int) -> bool:
        """Returns True if other sequences can continue from the first `length` tokens of `seq` once these are computed.

        If states are not divisible, this requires a save at `length`, which `save_at` has or can still register."""
        if self._context.divisible:
            return True
        if self._offload is None:  # the running sequence cannot be cut, so only a saved state can be shared
            return False
        return self._active[seq].can_save_at(length, self._tree.length(seq))

    def save_at(self, seq: int, length: int) -> None:
        """Registers a save of the whole sequence at `length` tokens, so that other sequences can continue from there.
        No effect if states are divisible or `can_share_at` returns False."""
        points = self._active[seq].save_points
        if not self._context.divisible and self.can_share_at(seq, length) and length not in points:
            insort(points, length)

    def saves_next(self, seq: int) -> bool:
        """Returns True if the whole sequence is saved after its next token: its state must not contain further rows."""
        points = self._active[seq].save_points
        return bool(points) and points[0] == self._tree.length(seq) + 1

    def rollback(self, seq: int) -> bool:
        """Frees the cells of rows that were computed but not committed. Returns False if the remaining sequence cannot
        be continued; the caller then releases it with `keep` False."""
        return self._residents.cut(seq, self._tree.length(seq), rows=True)

    def release(self, seq: int, *, keep: bool) -> None:
        """Ends an allocation. With `keep` the sequence becomes idle, otherwise it is dropped."""
        self._offloader.end(self._active.pop(seq))
        if keep:
            self._eviction.add(seq)
        else:
            self._eviction.free(seq)

    # ── keeping ──

    def evict(self, cells: int) -> None:
        """Unified KV: evicts idle sequences, least recently used first, until `cells` cells are free or none is idle.
        No effect with per-slot KV, where the cells of one slot are of no use to another."""
        if self._context.unified:
            self._eviction.make_room(cells, self.free_cells)

    def drop_idle(self) -> None:
        """Evicts every idle sequence, with unified and with per-slot KV, so that the next prompts share nothing."""
        self._eviction.drop_all()

    def set_costs(self, costs: Costs) -> None:
        """Sets the measured costs. `costs.move` is ignored, as the cache measures it."""
        move = self._offloader.move_seconds
        self._allocator.costs = Costs(costs.compute, move, costs.resident, costs.extra_pass)
        self._idle.cell_seconds_per_step = costs.resident if self._context.unified else 0.0

    def count_step(self) -> None:
        """Counts one step, for the age of idle sequences and the cost of keeping them."""
        self._idle.count_step()

    def maintain(self, seconds: float) -> bool:
        """Evicts and saves idle sequences for about `seconds`. Returns True if unsaved idle sequences remain."""
        if self._offload is not None:
            self._offload.poll()
        more = self._eviction.maintain(seconds, self._allocator.costs)
        if self._changes is not None:
            self._changes.flush()
        return more

    def report_changes(self, sink: ChangeSink) -> None:
        """Starts reporting: at the end of each `maintain`, `sink` is called with all full blocks that entered or left
        cells, RAM or disk since the last call, if there are any."""
        self._changes = BlockChanges(self._residents, self._offload, sink)

    def close_gap(self) -> tuple[int, int] | None:
        """Per-slot KV: moves an allocated sequence to another id once a gap among the ids has cost more than the move.
        Called once a step. Returns the old and the new id; None if no sequence was moved."""
        if (moved := self._allocator.close_gap()) is not None:
            self._active[moved[1]] = self._active.pop(moved[0])
        return moved

    def close(self) -> None:
        """Waits up to 5 seconds for queued writes to disk. No method may be called afterwards."""
        if self._offload is not None:
            self._offload.close()

    def stats(self) -> KVStats:
        """Returns the current counts."""
        ram, disk = (0, 0) if self._offload is None else (self._offload.ram.bytes, self._offload.disk.bytes)
        saved, restored = self._offloader.saved_tokens, self._offloader.restored_tokens
        return KVStats(self._context.cells, self._tree.cells, self._residents.idle_cells, saved, restored, ram, disk)

    def check(self, *, tiers: bool = True) -> None:
        """Raises AssertionError unless tree and context agree and each id is free, allocated or idle. With `tiers`,
        also checks the offload tiers, in time proportional to their blocks."""
        self._residents.check()
        assert self._residents.allocated == self._active.keys(), "every allocated id is active"
        if tiers and self._offload is not None:
            self._offload.check()
