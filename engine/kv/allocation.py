"""Arguments and results of `KVCache`: the match of a prompt, an allocation, blocks to load."""

from __future__ import annotations

from array import array
from collections import deque
from typing import NamedTuple

from msgspec import Struct

from engine.kv.block import Block, BlockChain

# Maximum number of save points of one sequence: a save takes time proportional to the sequence's length.
MAX_SAVE_POINTS = 4


class Match(Struct, frozen=True):
    """The longest prefix of a prompt that is resident in cells or stored in blocks."""

    tokens: array[int]
    matchable: array[int]
    """`tokens` without the last ones, which are always computed, as the logits after the prompt are needed."""
    salt: str
    seq: int
    """The sequence that holds the resident tokens; -1 if no token is resident."""
    length: int
    """Number of resident tokens."""
    idle_cells: int
    """Cells of the resident tokens that only idle sequences hold. An allocation of the prefix makes them
    unevictable."""
    stored: BlockChain
    """Blocks that continue the resident tokens."""
    version: int = 0
    """`KVCache.version` at the time of the match."""

    @property
    def known_length(self) -> int:
        """Number of tokens that need not be computed, as they are resident or stored in blocks."""
        return max(self.length, self.stored.length)


class Allocation(Struct, frozen=True):
    """A sequence id of the context, held by one running request until `KVCache.release`."""

    seq: int
    cached: int
    """Number of tokens that were resident at the time of allocation."""


class BlockToLoad(NamedTuple):
    """A block that is loaded once a sequence has `start` tokens; afterwards the sequence has `end` tokens.

    `shift` is None for a block that was computed after the same prefix. Any other block was computed after other
    tokens; its new positions are its old positions plus `shift`, to which `Context.shift` moves its state.
    """

    block: Block
    start: int
    end: int
    shift: int | None = None


def blocks_to_load(stored: BlockChain, length: int, *, divisible: bool) -> list[BlockToLoad]:
    """Returns the blocks of `stored` to load into a sequence of `length` tokens: parts of blocks, or whole states if
    states are not `divisible`."""
    if not divisible:
        return [BlockToLoad(block, 0, block.end) for block in stored.blocks]
    return [BlockToLoad(block, max(length, block.start), min(block.end, stored.length)) for block in stored.blocks]


class Loaded(NamedTuple):
    """Number of tokens that one call of `KVCache.load` added, and the number of these that were moved from other
    positions."""

    tokens: int = 0
    moved: int = 0


class Active(Struct):
    """State of an allocated sequence inside the cache.

    `cursor` and `unsaved` are used only with a sliding window and divisible states, where `Offloader.save_grown` saves
    each block before its cells leave the window.
    """

    to_load: deque[BlockToLoad]
    """Ordered by position."""
    save_points: list[int] = []
    """Lengths in tokens, ascending, at which the whole sequence is saved. Empty if states are divisible."""
    pending_since: float | None = None
    """Monotonic time at which the read of the next block from disk began. None if no read is pending."""
    cursor: Block | None = None
    """The last saved block, pinned in the block tree. None where it is not used."""
    unsaved: array[int] = array("i")
    """Tokens of the sequence after `cursor`."""

    @property
    def loaded_length(self) -> int:
        """Length of the sequence once all of `to_load` is loaded; 0 if `to_load` is empty."""
        return self.to_load[-1].end if self.to_load else 0

    def can_save_at(self, length: int, current: int) -> bool:
        """Returns True if `length` is a save point, or can become one of a sequence that has `current` tokens."""
        passed = max(current, self.loaded_length)
        return length in self.save_points or (length > passed and len(self.save_points) < MAX_SAVE_POINTS)

    def pass_save_points(self, length: int) -> bool:
        """Removes the save points up to `length`. Returns True if there were any."""
        count = len(self.save_points)
        self.save_points = [point for point in self.save_points if point > length]
        return len(self.save_points) < count

    def ready(self, length: int, known: int) -> int:
        """Returns how many of the `known` tokens after `length` can be computed before the next load or save point."""
        if not (self.to_load or self.save_points):  # the fast path of nearly all calls
            return known - length
        bounds = [known, *self.save_points[:1]]
        if self.to_load:
            bounds.append(self.to_load[0].start)
        return min(bounds) - length


class KVStats(Struct, frozen=True):
    """Usage of the cells and the tiers."""

    cells: int
    used: int
    """Cells that any sequence holds."""
    idle: int
    """Cells that only idle sequences hold."""
    saved_tokens: int
    """Tokens saved to the tiers since the start. `restored_tokens` are those loaded back."""
    restored_tokens: int
    ram_bytes: int
    disk_bytes: int
