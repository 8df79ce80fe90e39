"""Moves KV between the context and the offload tiers, and measures the seconds per token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from engine.backend import Context, Snapshot, StatePart
from engine.kv.allocation import Active, BlockToLoad, Loaded
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.offload import Offload
from engine.kv.tree import PrefixTree

# Seconds to move a token, assumed until the first move is measured.
MOVE_SECONDS = 5e-6
# Weight of a new measurement in the running mean.
MOVE_WEIGHT = 0.2
# A read from disk that takes longer is cancelled, and the tokens are computed.
GIVE_UP_SECONDS = 10.0
# Number of blocks whose reads from disk are pending or done while earlier blocks are loaded.
READ_AHEAD_BLOCKS = 8
# With per-slot KV each load also copies the cells that the sequence has already, so one load takes many tokens.
PER_SLOT_LOAD_TOKENS = 4096


class Offloader:
    """Saves sequences of `context` to `offload` in blocks and loads them back. Belongs to the engine thread."""

    def __init__(self, context: Context, tree: PrefixTree, offload: Offload | None) -> None:
        self._context = context
        self._tree = tree
        self.offload = offload
        self.saved_tokens = self.restored_tokens = 0
        """Tokens moved to the tiers and back since the start."""
        self.move_seconds = MOVE_SECONDS
        """Running mean of the seconds to move one token."""

    # ── saving ──

    def save(self, seq: int, start: int = 0, end: int | None = None) -> None:
        """Saves the blocks of `seq` from `start` up to `end` that are not stored."""
        if self.offload is not None:
            begun = time.perf_counter()
            missing = self.offload.tree.missing(self._tree.tokens(seq)[:end], self._tree.salt(seq), start)
            self._put(missing, self._context.save(seq) if missing else None, begun)

    def save_some(self, seq: int, start: int, max_blocks: int, snapshot: Snapshot | None) -> int:
        """Saves up to `max_blocks` blocks of `seq` from `start` on that are not stored, cut from `snapshot`. Returns
        the position up to which all blocks are saved."""
        assert self.offload is not None, "there is a tier"
        begun = time.perf_counter()
        missing = self.offload.tree.missing(self._tree.tokens(seq), self._tree.salt(seq), start)
        self._put(missing[:max_blocks], snapshot, begun)
        for block in missing[max_blocks:]:
            self.offload.tree.prune(block)
        return missing[max_blocks].start if len(missing) > max_blocks else self._tree.length(seq)

    def _put(self, blocks: Sequence[Block], snapshot: Snapshot | None, begun: float) -> None:
        """Stores the states of `blocks`, cut from `snapshot`. Prunes blocks whose positions are missing, all if
        `snapshot` is None."""
        assert self.offload is not None, "there is a tier"
        saved = 0
        for block in blocks:
            first = block.start if self._context.divisible else 0
            state = snapshot.cut(first, block.end) if snapshot is not None else None
            if state is None:
                self.offload.tree.prune(block)
            else:
                self.offload.put(block, state)
                saved += block.end - first
        self.saved_tokens += saved
        self._measure_move(saved, begun)

    def save_grown(self, seq: int, active: Active) -> None:
        """Saves the full blocks of `active.unsaved`, before their cells leave the sliding window."""
        assert self.offload is not None, "there is a tier"
        assert active.cursor is not None, "set when the sequence was allocated"
        while len(active.unsaved) >= BLOCK_TOKENS:
            active.cursor = block = self.offload.tree.pin_child(active.cursor, active.unsaved[:BLOCK_TOKENS])
            del active.unsaved[:BLOCK_TOKENS]
            if not self.offload.has(block):
                begun = time.perf_counter()
                self._put([block], self._context.save(seq), begun)

    # ── loading ──

    def load(self, seq: int, active: Active, seconds: float, *, wait: bool) -> Loaded:
        """Loads the next blocks of `active`: at least one, with unified KV for about `seconds`, with per-slot KV up to
        `PER_SLOT_LOAD_TOKENS` tokens.

        Clears `active.to_load` if the next block was evicted or the cells do not suffice. With `wait`, blocks for up to
        `DISK_WAIT_SECONDS` until the next block has been read from disk.
        """
        assert self.offload is not None, "blocks come from a tier"
        if not self._next_is_ready(active, wait=wait):
            return Loaded()
        begun, blocks, parts = time.perf_counter(), list[BlockToLoad](), list[StatePart]()
        length = self._tree.length(seq)
        for block in islice(active.to_load, self._blocks_per_load(seconds)):
            if block.start != length or (parts and not self.offload.prefetch([block.block], wait=False)):
                break
            part = self._part(block)
            if part is None:
                break
            blocks.append(block)
            parts.append(part)
            length = block.end
        if not parts or not self._context.load(seq, parts):
            self.cancel_loads(active)
            return Loaded()
        for block in blocks:
            active.to_load.popleft()
            added = self._tokens(block)
            self._tree.extend(seq, added)
            if active.cursor is not None:
                active.unsaved.extend(added)
        tokens = sum(block.end - block.start for block in blocks)
        self.restored_tokens += tokens
        self._measure_move(tokens, begun)
        return Loaded(tokens, sum(block.end - block.start for block in blocks if block.shift is not None))

    def _part(self, block: BlockToLoad) -> StatePart | None:
        assert self.offload is not None, "blocks come from a tier"
        state = self.offload.get(block.block)
        if state is not None and block.shift:
            state = self._context.shift(state, block.start - block.shift, block.end - block.shift, block.shift)
        return None if state is None else StatePart(state, block.start, block.end)

    def _tokens(self, block: BlockToLoad) -> Sequence[int]:
        if not self._context.divisible:
            return block.block.prefix
        return block.block.part(block.start, block.end, block.shift or 0)

    def cells_for(self, active: Active, seconds: float) -> int:
        """Returns the maximum number of cells that the next call of `load` takes."""
        return sum(block.end - block.start for block in islice(active.to_load, self._blocks_per_load(seconds)))

    def _blocks_per_load(self, seconds: float) -> int:
        """Returns the maximum number of blocks that one call of `load` loads."""
        if not self._context.unified:
            return PER_SLOT_LOAD_TOKENS // BLOCK_TOKENS
        return self.blocks_within(seconds)

    def blocks_within(self, seconds: float) -> int:
        """Returns how many blocks can be moved in `seconds`, at least one."""
        return max(1, int(seconds / (BLOCK_TOKENS * self.move_seconds)))

    def _next_is_ready(self, active: Active, *, wait: bool) -> bool:
        """Returns True if the next block can be loaded now. Reads ahead; cancels all loads if a read takes too long."""
        assert self.offload is not None, "blocks come from a tier"
        ahead = [block.block for block in islice(active.to_load, READ_AHEAD_BLOCKS)]
        if not ahead:
            return False
        if self.offload.prefetch(ahead, wait=wait):
            active.pending_since = None
            return True
        now = time.monotonic()
        active.pending_since = active.pending_since or now
        if now - active.pending_since > GIVE_UP_SECONDS:
            self.cancel_loads(active)
        return False

    def end(self, active: Active) -> None:
        """Cancels the loads of `active` and unpins its last saved block. Called when the sequence is released."""
        self.cancel_loads(active)
        if self.offload is not None and active.cursor is not None:
            self.offload.tree.unpin(active.cursor)

    def cancel_loads(self, active: Active) -> None:
        """Cancels pending reads and clears `active.to_load`. The remaining tokens of the prompt are then computed."""
        if self.offload is not None:
            self.offload.cancel([block.block for block in active.to_load])
        active.to_load.clear()

    def _measure_move(self, tokens: int, begun: float) -> None:
        if tokens:
            measured = (time.perf_counter() - begun) / tokens
            self.move_seconds += MOVE_WEIGHT * (measured - self.move_seconds)
