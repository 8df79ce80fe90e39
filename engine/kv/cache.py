"""The façade of the KV cache: match, allocate, load, commit, roll back, release, evict.

An id of the context is free, allocated to a running request, or idle: released, and kept because a later prompt may
begin with its tokens. With unified KV idle sequences are evicted from their ends, least recently used first, when cells
or ids are needed or when keeping them has cost as much as restoring them would. With per-slot KV an idle sequence stays
in its slot at no cost until a prompt takes that slot. With offload tiers everything that leaves is saved there first.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import islice

from msgspec import structs

from engine.backend import Context
from engine.kv.allocation import MAX_SAVE_POINTS, Active, Allocation, BlockToLoad, KVStats, Loaded, Match
from engine.kv.allocator import Allocator
from engine.kv.block import BLOCK_TOKENS, BlockChain
from engine.kv.block_tree import RECENT_SEQUENCES
from engine.kv.eviction import Eviction
from engine.kv.offload import Offload
from engine.kv.offloader import Offloader
from engine.kv.placement import Costs
from engine.kv.residents import Residents
from engine.kv.reuse import MIN_RUN_TOKENS, best_donor, shifted
from engine.kv.transfer import Transfer

# Count of free cells with per-slot KV, where every slot has all the cells that its sequence may need.
UNBOUNDED_CELLS = 2**30


class KVCache:
    """The KV cache of one context. Belongs to the engine thread."""

    def __init__(self, context: Context, offload: Offload | None = None, reuse: int = 0) -> None:
        """`reuse` is the least number of recurring tokens that are moved to other positions; 0 disables moving."""
        self._context = context
        self._residents = Residents(context)
        self._tree, self._idle = self._residents.tree, self._residents.idle
        self._offload = offload
        self._offloader = Offloader(context, self._tree, offload)
        self._eviction = Eviction(context, self._residents, self._offloader)
        self._allocator = Allocator(context, self._residents, self._eviction, offloads=offload is not None)
        self._active: dict[int, Active] = {}
        self.transfer = Transfer(context, self._residents, self._eviction, offload)
        """Exports, imports and erases sequences that no request computes."""
        self.reuse = max(MIN_RUN_TOKENS, reuse) if reuse and offload is not None and context.shifts else 0
        """The least number of recurring tokens that are moved, in force; 0 if none are."""

    @property
    def offloads(self) -> bool:
        """True if evicted prefixes are saved to a tier."""
        return self._offload is not None

    @property
    def divisible(self) -> bool:
        """True if the states of a sequence can be cut into blocks; False if only whole sequences can be saved."""
        return self._context.divisible

    # ── room ──

    @property
    def free(self) -> int:
        """Cells that no sequence holds; `UNBOUNDED_CELLS` with per-slot KV."""
        return self._context.cells - self._tree.cells if self._context.unified else UNBOUNDED_CELLS

    @property
    def evictable(self) -> int:
        """Cells that `evict` can free."""
        return self._residents.idle_cells if self._context.unified else 0

    @property
    def resident(self) -> int:
        """Cells in use."""
        return self._tree.cells

    def exclusive(self, seq: int) -> int:
        """Returns the number of cells that only `seq` holds."""
        return self._tree.exclusive(seq)

    def length(self, seq: int) -> int:
        """Returns the number of tokens of `seq` in cells."""
        return self._tree.length(seq)

    # ── matching ──

    @property
    def version(self) -> int:
        """Grows when a prefix is released, dropped or stored: a `Match` of another version may be out of date."""
        return self._residents.version + (self._offload.version if self._offload is not None else 0)

    def match(self, tokens: array[int], salt: str, last: Match | None = None) -> Match:
        """Returns the longest known prefix of `tokens`; or `last`, an earlier match of the same prompt, if it is
        valid."""
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

    def allocate(self, match: Match) -> Allocation:
        """Allocates a sequence id that holds the longest resident prefix of the prompt. The blocks that continue the
        prefix are loaded by `load`. Always succeeds, as no more ids are allocated than slots exist."""
        match = self.match(match.tokens, match.salt)
        seq, length = self._allocator.place(match)
        matchable = match.matchable
        stored = match.stored if length == match.length else self._stored(matchable, match.salt, length)
        to_load = self._to_load(stored, length)
        reach = to_load[-1].end if to_load else length
        active = self._active[seq] = Active(deque(to_load + self._shifted(matchable, match.salt, reach, but=seq)))
        if self._offload is not None and self._context.window and self._context.divisible:
            start = length // BLOCK_TOKENS * BLOCK_TOKENS
            active.cursor = self._offload.tree.pin(matchable[:start], match.salt)
            active.unsaved = matchable[start:length]
        return Allocation(seq, length)

    def _to_load(self, stored: BlockChain, length: int) -> list[BlockToLoad]:
        if not self._context.divisible:
            return [BlockToLoad(block, 0, block.end) for block in stored.blocks]
        return [BlockToLoad(block, max(length, block.start), min(block.end, stored.length)) for block in stored.blocks]

    def _shifted(self, tokens: array[int], salt: str, start: int, but: int) -> list[BlockToLoad]:
        """Returns blocks computed at other positions that hold parts of `tokens` from `start` on, none of `but`'s."""
        if not self.reuse or self._offload is None or len(tokens) - start < self.reuse:
            return []
        latest = islice((seq for seq in self._tree.sequences(salt) if seq != but), RECENT_SEQUENCES)
        candidates = [(seq, self._tree.tokens(seq)) for seq in latest]
        candidates += [(-1, stored) for stored in self._offload.tree.recent(tokens, salt)]
        donor = best_donor(tokens, start, self.reuse, candidates)
        if donor.runs and donor.seq >= 0:
            end = max(run.old + run.size for run in donor.runs)
            self._offloader.save(donor.seq, min(run.old for run in donor.runs), -(-end // BLOCK_TOKENS) * BLOCK_TOKENS)
        blocks = self._offload.tree.blocks_of(donor.tokens, salt)
        return [block for run in donor.runs for block in shifted(run, blocks)]

    # ── running ──

    def ready(self, seq: int, known: int) -> int:
        """Returns how many of `known` tokens can be computed before the next load or save point."""
        return self._active[seq].ready(self._tree.length(seq), known)

    def loading(self, seq: int) -> bool:
        """True if a block is to be loaded before the next token can be computed."""
        active = self._active[seq]
        return bool(active.to_load) and active.to_load[0].start == self._tree.length(seq)

    def load(self, seq: int, seconds: float, *, wait: bool) -> Loaded:
        """Loads the next blocks for about `seconds`. If a block is gone or finds no cells, the rest of the prompt is to
        be computed instead. `wait` blocks up to `DISK_WAIT_SECONDS` for the disk."""
        active = self._active[seq]
        self.evict(self._offloader.cells_for(active, seconds))
        return self._offloader.load(seq, active, seconds, wait=wait)

    def commit(self, seq: int, tokens: Sequence[int]) -> None:
        """Appends `tokens`, which the last decode computed, to the sequence."""
        self._tree.extend(seq, tokens)
        active, length = self._active[seq], self._tree.length(seq)
        if active.save_points and length >= active.save_points[0]:
            active.save_points = [point for point in active.save_points if point > length]
            self._offloader.save(seq)
        if active.cursor is not None:
            active.unsaved.extend(tokens)
            self._offloader.save_grown(seq, active)

    def can_share_at(self, seq: int, length: int) -> bool:
        """True if other sequences can continue from the first `length` tokens of `seq` once these are computed: if
        states are divisible, or if the state at that length is or can still be registered by `save_at`."""
        if self._context.divisible or self._offload is None:
            return self._context.divisible
        active = self._active[seq]
        ahead = max(self._tree.length(seq), active.reach)
        return length in active.save_points or (length > ahead and len(active.save_points) < MAX_SAVE_POINTS)

    def save_at(self, seq: int, length: int) -> None:
        """Registers a save of the whole sequence at `length` tokens, for others to continue from, if `can_share_at`.
        No effect if states are divisible: no save is needed then."""
        points = self._active[seq].save_points
        if not self._context.divisible and self.can_share_at(seq, length) and length not in points:
            insort(points, length)

    def rollback(self, seq: int) -> bool:
        """Frees the cells of rows that were computed but not committed. False if the rest cannot be continued; the
        caller then releases the sequence without keeping it."""
        return self._residents.cut(seq, self._tree.length(seq))

    def release(self, seq: int, *, keep: bool) -> None:
        """Ends an allocation. With `keep` the sequence stays resident as an idle one."""
        self._offloader.leave(self._active.pop(seq))
        if keep:
            self._eviction.add(seq)
        else:
            self._eviction.free(seq)

    # ── keeping ──

    def evict(self, cells: int) -> None:
        """Unified KV: evicts idle sequences, least recently used first, until `cells` are free or none is idle."""
        if self._context.unified:
            self._eviction.make_room(cells, self.free)

    def drop_idle(self) -> None:
        """Evicts every idle sequence, in both layouts."""
        self._eviction.drop_all()

    def price(self, costs: Costs) -> None:
        """Sets the costs of computing, keeping and passes; `Costs.move` is measured by the cache and ignored."""
        self._allocator.costs = structs.replace(costs, move=self._offloader.move_seconds)
        self._idle.rate = costs.resident if self._context.unified else 0.0

    def step(self) -> None:
        """Counts a decode of the batch."""
        self._idle.step()

    def maintain(self, seconds: float) -> bool:
        """Evicts and saves idle sequences for about `seconds`. True if idle sequences are still to be saved."""
        if self._offload is not None:
            self._offload.poll()
        return self._eviction.maintain(seconds, self._allocator.costs)

    def close_gap(self) -> tuple[int, int] | None:
        """Per-slot KV, once a step: moves an allocated sequence to another id if a gap among the ids costs more.
        Returns the old and the new id, or None if nothing moved."""
        if (moved := self._allocator.close_gap()) is not None:
            self._active[moved[1]] = self._active.pop(moved[0])
        return moved

    def close(self) -> None:
        """Waits some seconds for queued writes to disk."""
        if self._offload is not None:
            self._offload.close()

    def stats(self) -> KVStats:
        """Returns the current counts."""
        ram, disk = (0, 0) if self._offload is None else (self._offload.ram.bytes, self._offload.disk.bytes)
        mover, cells = self._offloader, self._context.cells
        return KVStats(cells, self._tree.cells, self._residents.idle_cells, mover.saved, mover.restored, ram, disk)

    def check(self, *, tiers: bool = True) -> None:
        """Raises AssertionError unless tree and context agree, each id is free, allocated or idle, and with `tiers` the
        offload tiers agree too, which takes time in proportion to their blocks."""
        self._residents.check()
        assert self._residents.allocated == self._active.keys(), "every allocated id is active"
        if tiers and self._offload is not None:
            self._offload.check()
