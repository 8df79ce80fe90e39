"""Exports a token sequence and its states from context and tiers, imports it, and erases it.

A part has up to `BLOCK_TOKENS` tokens and begins at a multiple of `BLOCK_TOKENS`, as blocks do. If states are not
divisible, a sequence is one part.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from engine.backend import Context, Snapshot, State
from engine.kv.block import BLOCK_TOKENS, Block
from engine.kv.eviction import Eviction
from engine.kv.offload import Offload
from engine.kv.offloader import READ_AHEAD_BLOCKS
from engine.kv.residents import Residents
from engine.kv.sequence_file import SequencePart


class Exported(NamedTuple):
    """Result of one call of `export`."""

    parts: list[SequencePart]
    """Consecutive parts. Empty if no part follows, or if `more` is True and the next block is being read from disk."""
    more: bool
    """True if parts may follow. The caller then calls `export` with the end of the last part as `start`, after a short
    pause if `parts` is empty."""


class Transfer:
    """Exports, imports and erases sequences. Belongs to the engine thread."""

    def __init__(self, context: Context, residents: Residents, eviction: Eviction, offload: Offload | None) -> None:
        self._context = context
        self._residents = residents
        self._eviction = eviction
        self._offload = offload

    def export(self, tokens: array[int], salt: str, start: int, seconds: float) -> Exported:
        """Exports parts of `tokens` for about `seconds`. `start` is 0 or the end of the last exported part.

        Sequences and cells do not change. Blocks that are only on disk are read into RAM if they fit.
        """
        if not self._context.divisible:
            return Exported([], False) if start else self._export_whole(tokens, salt)
        until = time.perf_counter() + seconds
        parts: list[SequencePart] = []
        seq, length = self._residents.match(tokens, salt)
        snapshot = self._context.save(seq) if start < length else None
        stored = self._offload.tree.blocks_of(tokens, salt) if self._offload is not None else {}
        while start < len(tokens) and time.perf_counter() < until:
            end = min(start + BLOCK_TOKENS, len(tokens))
            state = snapshot.cut(start, end) if snapshot is not None and end <= length else None
            if state is None:
                block = stored.get(start)
                if block is None or block.end != end:
                    return Exported(parts + _export_end(snapshot, tokens, start, length), False)
                if not self._is_ready(stored, start):
                    return Exported(parts, True)
                if (state := self._state(block)) is None:
                    return Exported(parts, False)
            parts.append(SequencePart(start, tokens[start:end], state))
            start = end
        return Exported(parts, start < len(tokens))

    def _is_ready(self, stored: dict[int, Block], start: int) -> bool:
        """Returns True if the state of the block at `start` is in RAM or has been read. Starts to read the blocks after
        it."""
        starts = range(start, start + READ_AHEAD_BLOCKS * BLOCK_TOKENS, BLOCK_TOKENS)
        ahead = [stored[start] for start in starts if start in stored]
        return self._offload is None or self._offload.prefetch(ahead, wait=False)

    def _state(self, block: Block) -> State | None:
        return self._offload.get(block) if self._offload is not None else None

    def _export_whole(self, tokens: array[int], salt: str) -> Exported:
        """Exports the state of the longest resident or stored prefix as one part."""
        seq, length = self._residents.tree.match(tokens, salt, whole=True)
        blocks = self._offload.tree.match(tokens, salt, length).blocks if self._offload is not None else ()
        if self._offload is not None and blocks:
            if not self._offload.prefetch(blocks, wait=False):
                return Exported([], True)
            length, state = blocks[0].end, self._state(blocks[0])
        else:
            snapshot = self._context.save(seq) if length else None
            state = snapshot.cut(0, length) if snapshot is not None else None
        return Exported([] if state is None else [SequencePart(0, tokens[:length], state)], False)

    def put(self, tokens: array[int], salt: str, parts: Sequence[SequencePart]) -> None:
        """Stores consecutive parts of a sequence. `tokens` are all tokens of the sequence up to the end of the last
        part. The earlier parts must be stored already. Other blocks may be evicted. Requires an offload tier."""
        assert self._offload is not None, "there is a tier"
        states = {part.end: part.state for part in parts}
        for block in self._offload.tree.missing(tokens, salt, parts[0].start):
            state = states.get(block.end)
            if state is None:
                self._offload.tree.prune(block)
            else:
                self._offload.put(block, state)

    def known_length(self, tokens: array[int], salt: str) -> int:
        """Returns the number of tokens in the longest prefix of `tokens` that is resident or stored."""
        length = self._residents.match(tokens, salt).length
        return max(length, self._offload.tree.match(tokens, salt, length).length if self._offload is not None else 0)

    def erase(self, tokens: array[int], salt: str) -> int:
        """Drops the blocks of `tokens` that no other sequence shares, and idle sequences that are a prefix of `tokens`.
        Returns the number of tokens by which the known prefix became shorter."""
        before, tree = self.known_length(tokens, salt), self._residents.tree
        for seq in tree.sequences(salt):
            held = tree.tokens(seq) if seq in self._residents.idle else None
            if held is not None and held == tokens[: len(held)]:
                self._eviction.free(seq)
        if self._offload is not None:
            self._offload.erase(tokens, salt)
        return before - self.known_length(tokens, salt)


def _export_end(snapshot: Snapshot | None, tokens: array[int], start: int, end: int) -> list[SequencePart]:
    """Exports the resident tokens from `start` up to `end`, the end of the resident prefix, if they are fewer than a
    block."""
    if snapshot is None or not start < end < start + BLOCK_TOKENS:
        return []
    state = snapshot.cut(start, end)
    return [] if state is None else [SequencePart(start, tokens[start:end], state)]
