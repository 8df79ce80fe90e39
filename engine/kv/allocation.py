"""The values of the façade: the match of a prompt, an allocation, blocks to load."""

from __future__ import annotations

from array import array
from collections import deque
from typing import NamedTuple

from msgspec import Struct

from engine.kv.block import Block, BlockChain

# A save takes time in proportion to the sequence's length, and a save point ends a prefill chunk.
MAX_SAVE_POINTS = 4


class Match(Struct, frozen=True):
    """The longest known prefix of a prompt, without the last tokens, which have to be computed."""

    tokens: array[int]
    matchable: array[int]
    """The part of `tokens` that may be matched. The rest is always computed, for the logits after the prompt."""
    salt: str
    seq: int
    """The sequence that holds the resident part; -1 if nothing is resident."""
    length: int
    """Number of resident tokens."""
    idle: int
    """Of these, cells that only idle sequences hold. They cannot be evicted once the prefix is allocated."""
    stored: BlockChain
    """Blocks that continue the resident part."""
    version: int = 0
    """`KVCache.version` at the time of the match."""

    @property
    def reach(self) -> int:
        """Tokens that need no computing: resident, or stored in blocks."""
        return max(self.length, self.stored.length)


class Allocation(Struct, frozen=True):
    """A sequence id of the context, held by one running request until `KVCache.release`."""

    seq: int
    cached: int
    """Tokens resident at the time of allocation."""


class BlockToLoad(NamedTuple):
    """A block to be loaded once a sequence has `start` tokens; afterwards the sequence has `end` tokens.

    `shift` is None for a block of the same prefix. Otherwise the block was computed after other tokens, at positions
    lower by `shift`.
    """

    block: Block
    start: int
    end: int
    shift: int | None = None


class Loaded(NamedTuple):
    """Tokens that one call of `KVCache.load` added, and of these the ones moved from other positions."""

    tokens: int = 0
    moved: int = 0


class Active(Struct):
    """State of an allocated sequence inside the cache."""

    to_load: deque[BlockToLoad]
    """Ordered by position."""
    save_points: list[int] = []
    """Lengths, ascending, at which the whole sequence is saved, if its state is not divisible."""
    pending_since: float | None = None
    """Monotonic time since which the next block is being read from disk. None if no read is pending."""
    cursor: Block | None = None
    """The last block saved while the sequence grows, with a sliding window. None without one."""
    unsaved: array[int] = array("i")
    """Tokens after `cursor`."""

    @property
    def reach(self) -> int:
        """Length of the sequence after all of `to_load`; 0 if `to_load` is empty."""
        return self.to_load[-1].end if self.to_load else 0

    def ready(self, length: int, known: int) -> int:
        """Returns how many of the `known` tokens after `length` can be computed before the next load or save point."""
        if not (self.to_load or self.save_points):  # nearly always, and called for each sequence and step
            return known - length
        bounds = [known, *self.save_points[:1]]
        if self.to_load:
            bounds.append(self.to_load[0].start)
        return min(bounds) - length


class KVStats(Struct, frozen=True):
    """Counts in cells, tokens and bytes."""

    cells: int
    used: int
    idle: int
    """Of the used cells, those that no running sequence holds."""
    saved_tokens: int
    restored_tokens: int
    ram_bytes: int
    disk_bytes: int
