"""Moves KV between the context and the offload tiers, and learns what that costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from engine.backend import Context, Part, Snapshot
from engine.kv.allocation import Active, BlockToLoad, Loaded
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.offload import Offload
from engine.kv.tree import PrefixTree

# Seconds to move a token before any was moved.
MOVE_SECONDS = 5e-6
# Share of a new measurement in the running mean.
MOVE_WEIGHT = 0.2
# Seconds after which a disk that does not answer is given up.
GIVE_UP_SECONDS = 10.0
# Blocks that are read from disk ahead of their loading.
READ_AHEAD_BLOCKS = 8
# Tokens that one call loads at most with per-slot KV, where each call copies what the sequence has already.
LOAD_TOKENS = 4096


class Offloader:
    """Saves sequences of `context` to `offload` in blocks and loads them back. Belongs to the engine thread."""

    def __init__(self, context: Context, tree: PrefixTree, offload: Offload | None) -> None:
        self._context = context
        self._tree = tree
        self.offload = offload
        self.saved = self.restored = 0
        """Tokens moved to the tiers, and back."""
        self.move_seconds = MOVE_SECONDS
        """Seconds to move a token, a running mean."""

    # ── saving ──

    def save(self, seq: int, start: int = 0, end: int | None = None) -> None:
        """Saves the blocks of `seq` from `start` up to `end` that have no state."""
        if self.offload is not None:
            begun = time.perf_counter()
            missing = self.offload.missing(self._tree.tokens(seq)[:end], self._tree.salt(seq), start)
            self._put(missing, self._context.save(seq) if missing else None, begun)

    def save_some(self, seq: int, start: int, most: int, snapshot: Snapshot | None) -> int:
        """Saves at most `most` blocks of `seq` from `start` on that have no state. Returns the position up to which
        everything is saved now. `snapshot` is of `seq`."""
        assert self.offload is not None, "there is a tier"
        begun = time.perf_counter()
        missing = self.offload.missing(self._tree.tokens(seq), self._tree.salt(seq), start)
        self._put(missing[:most], snapshot, begun)
        for block in missing[most:]:
            self.offload.prune(block)
        return missing[most].start if len(missing) > most else self._tree.length(seq)

    def _put(self, blocks: Sequence[Block], snapshot: Snapshot | None, begun: float) -> None:
        """Stores the states of `blocks`, or drops them without a snapshot."""
        assert self.offload is not None, "there is a tier"
        saved = 0
        for block in blocks:
            first = block.start if self._context.divisible else 0
            state = snapshot.cut(first, block.end) if snapshot is not None else None
            if state is None:
                self.offload.prune(block)
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
            active.cursor = block = self.offload.pin_child(active.cursor, active.unsaved[:BLOCK_TOKENS])
            del active.unsaved[:BLOCK_TOKENS]
            if not self.offload.has(block):
                begun = time.perf_counter()
                self._put([block], self._context.save(seq), begun)

    # ── loading ──

    def load(self, seq: int, active: Active, seconds: float, *, wait: bool) -> Loaded:
        """Loads the next blocks of `active` for about `seconds`, at least one. If a block is gone, or the context has
        no cells for it, nothing more is to be loaded. `wait` waits a little for the disk."""
        assert self.offload is not None, "blocks come from a tier"
        if not self._fetched(active, wait=wait):
            return Loaded()
        begun, blocks, parts = time.perf_counter(), list[BlockToLoad](), list[Part]()
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

    def _part(self, block: BlockToLoad) -> Part | None:
        assert self.offload is not None, "blocks come from a tier"
        state = self.offload.get(block.block)
        if state is not None and block.shift:
            state = self._context.shift(state, block.start - block.shift, block.end - block.shift, block.shift)
        return None if state is None else Part(state, block.start, block.end)

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
        """Blocks that can be moved in so many seconds, at least one."""
        return max(1, int(seconds / (BLOCK_TOKENS * self.move_seconds)))

    def _fetched(self, active: Active, *, wait: bool) -> bool:
        """True if the next block can be loaded now. Gives up on a disk that does not answer."""
        assert self.offload is not None, "blocks come from a tier"
        ahead = [block.block for block in islice(active.to_load, READ_AHEAD_BLOCKS)]
        if not ahead:
            return False
        if self.offload.prefetch(ahead, wait=wait):
            active.waiting_since = None
            return True
        now = time.monotonic()
        active.waiting_since = active.waiting_since or now
        if now - active.waiting_since > GIVE_UP_SECONDS:
            self.give_up(active)
        return False

    def leave(self, active: Active) -> None:
        """The sequence of `active` ends: nothing more is saved or loaded."""
        self.give_up(active)
        if self.offload is not None and active.cursor is not None:
            self.offload.unpin(active.cursor)

    def give_up(self, active: Active) -> None:
        """Nothing more is loaded: the rest is to be computed."""
        if self.offload is not None:
            self.offload.cancel([block.block for block in active.to_load])
        active.to_load.clear()

    def _moved(self, tokens: int, begun: float) -> None:
        if tokens:
            measured = (time.perf_counter() - begun) / tokens
            self.move_seconds += MOVE_WEIGHT * (measured - self.move_seconds)
