"""Moves KV between the context and the offload tiers, and measures the cost per token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from engine.backend import Context, Snapshot, StatePart
from engine.kv.allocation import Active, BlockToLoad, Loaded
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.offload import Offload
from engine.kv.tree import PrefixTree

# Seconds per token, assumed until a move was measured.
MOVE_SECONDS = 5e-6
# Share of a new measurement in the running mean.
MOVE_WEIGHT = 0.2
# A read from disk that takes longer is given up.
GIVE_UP_SECONDS = 10.0
# Reads of the next blocks overlap with the loading of the current ones.
READ_AHEAD_BLOCKS = 8
# With per-slot KV each call copies the cells that the sequence has already, so calls load much at once.
LOAD_TOKENS = 4096


class Offloader:
    """Saves sequences of `context` to `offload` in blocks and loads them back. Belongs to the engine thread."""

    def __init__(self, context: Context, tree: PrefixTree, offload: Offload | None) -> None:
        self._context = context
        self._tree = tree
        self.offload = offload
        self.saved = self.restored = 0
        """Tokens moved to the tiers and back, ever."""
        self.move_seconds = MOVE_SECONDS
        """Running mean of the seconds to move a token."""

    # ── saving ──

    def save(self, seq: int, start: int = 0, end: int | None = None) -> None:
        """Saves the blocks of `seq` from `start` up to `end` that have no state."""
        if self.offload is not None:
            begun = time.perf_counter()
            missing = self.offload.tree.missing(self._tree.tokens(seq)[:end], self._tree.salt(seq), start)
            self._put(missing, self._context.save(seq) if missing else None, begun)

    def save_some(self, seq: int, start: int, max_blocks: int, snapshot: Snapshot | None) -> int:
        """Saves up to `max_blocks` blocks of `seq` from `start` on that have no state. Returns the position up to which
        all blocks are saved now. `snapshot` is of `seq`."""
        assert self.offload is not None, "there is a tier"
        begun = time.perf_counter()
        missing = self.offload.tree.missing(self._tree.tokens(seq), self._tree.salt(seq), start)
        self._put(missing[:max_blocks], snapshot, begun)
        for block in missing[max_blocks:]:
            self.offload.tree.prune(block)
        return missing[max_blocks].start if len(missing) > max_blocks else self._tree.length(seq)

    def _put(self, blocks: Sequence[Block], snapshot: Snapshot | None, begun: float) -> None:
        """Stores the states of `blocks`, or drops them without a snapshot."""
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
        self.saved += saved
        self._moved(saved, begun)

    def save_grown(self, seq: int, active: Active) -> None:
        """Saves the full blocks of `active.unsaved`, before they leave a sliding window."""
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
        """Loads the next blocks of `active` for about `seconds`, at least one. If a block is gone, or the context has
        no cells for it, `active.to_load` is cleared. `wait` blocks up to `DISK_WAIT_SECONDS` for the disk."""
        assert self.offload is not None, "blocks come from a tier"
        if not self._fetched(active, wait=wait):
            return Loaded()
        begun, blocks, parts = time.perf_counter(), list[BlockToLoad](), list[StatePart]()
        length = self._tree.length(seq)
        for block in islice(active.to_load, self._affordable(seconds)):
            if block.start != length or (parts and not self.offload.prefetch([block.block], wait=False)):
                break
            part = self._part(block)
            if part is None:
                break
            blocks.append(block)
            parts.append(part)
            length = block.end
        if not parts or not self._context.load(seq, parts):
            self.give_up(active)
            return Loaded()
        for block in blocks:
            active.to_load.popleft()
            added = self._tokens(block)
            self._tree.extend(seq, added)
            if active.cursor is not None:
                active.unsaved.extend(added)
        tokens = sum(block.end - block.start for block in blocks)
        self.restored += tokens
        self._moved(tokens, begun)
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
        """Cells that the next call of `load` takes."""
        return sum(block.end - block.start for block in islice(active.to_load, self._affordable(seconds)))

    def _affordable(self, seconds: float) -> int:
        """Blocks to load in one call."""
        if not self._context.unified:
            return LOAD_TOKENS // BLOCK_TOKENS
        return self.blocks_in(seconds)

    def blocks_in(self, seconds: float) -> int:
        """Returns how many blocks can be moved in `seconds`, at least one."""
        return max(1, int(seconds / (BLOCK_TOKENS * self.move_seconds)))

    def _fetched(self, active: Active, *, wait: bool) -> bool:
        """True if the next block can be loaded now. A read that takes too long is given up."""
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
            self.give_up(active)
        return False

    def leave(self, active: Active) -> None:
        """Ends the saving and loading of `active`, whose sequence is released."""
        self.give_up(active)
        if self.offload is not None and active.cursor is not None:
            self.offload.tree.unpin(active.cursor)

    def give_up(self, active: Active) -> None:
        """Clears `active.to_load`: the rest of the prompt is to be computed."""
        if self.offload is not None:
            self.offload.cancel([block.block for block in active.to_load])
        active.to_load.clear()

    def _moved(self, tokens: int, begun: float) -> None:
        if tokens:
            measured = (time.perf_counter() - begun) / tokens
            self.move_seconds += MOVE_WEIGHT * (measured - self.move_seconds)
