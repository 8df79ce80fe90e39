"""The values of the façade: the match of a prompt, an allocation, blocks to load."""

from __future__ import annotations

from array import array
from collections import deque
from typing import NamedTuple

from msgspec import Struct

from engine.kv.block import Block, BlockChain

# Save points of one sequence at most: each takes as long as the sequence is long, and ends a step.
MAX_SAVE_POINTS = 4


class Match(Struct, frozen=True):
    """The longest known prefix of `tokens`, without the last ones, which have to be computed."""

    tokens: array[int]
    wanted: array[int]
    """The part of `tokens` that may be matched: the rest gives the rows that have to be computed."""
    salt: str
    seq: int
    """The sequence that holds the resident part; -1 if nothing is resident."""
    length: int
    """Resident tokens."""
    idle: int
    """Of these, cells that only idle sequences hold: they cannot be evicted while the prefix is used."""
    stored: BlockChain
    """Blocks that continue the resident part."""
    version: int = 0

    @property
    def reach(self) -> int:
        """Tokens that need no computing: resident, or stored in blocks."""
        return max(self.length, self.stored.length)


class Allocation(Struct, frozen=True):
    """A sequence id of the context, given to one running request until `KVCache.release`."""

    seq: int
    cached: int
    """Tokens that were resident when it was allocated."""


class BlockToLoad(NamedTuple):
    """A block to be loaded once a sequence has `start` tokens, after which it has `end`.

    If `shift` is a number, the block was computed after other tokens, for positions `shift` before these.
    """

    block: Block
    start: int
    end: int
    shift: int | None = None


class Loaded(NamedTuple):
    """Tokens that one call of `KVCache.load` added, and of these the ones that were moved from other positions."""

    tokens: int = 0
    moved: int = 0


class Active(Struct):
    """What the cache keeps about an allocated sequence."""

    to_load: deque[BlockToLoad]
    """In the order of their positions."""
    save_points: list[int] = []
    """Lengths, ascending, at which the whole sequence is saved, if its state is not divisible."""
    waiting_since: float | None = None
    """When the disk was first asked for the next block without an answer."""
    cursor: Block | None = None
    """With a sliding window: the last block saved while the sequence grows."""
    unsaved: array[int] = array("i")
    """The tokens after `cursor`."""

    @property
    def reach(self) -> int:
        """The length after everything in `to_load`; 0 if that is nothing."""
        return self.to_load[-1].end if self.to_load else 0

    def ready(self, length: int, known: int) -> int:
        """The tokens after `length`, of `known`, to compute before the next block is loaded or the next save point."""
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
