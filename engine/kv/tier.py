"""The blocks of one offload tier, and the order of their eviction.

The policy is GreedyDual (Young 1994; Cao and Irani 1997, "Cost-aware WWW proxy caching algorithms"). The priority of a
block is the tier's clock at the block's last use plus its cost of recomputation per byte. The block of lowest priority
is evicted, and the clock advances to that priority. With equal costs GreedyDual is LRU.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count

from engine.kv.block import Block

# The heap is rebuilt without its outdated entries once it has more than this many entries for each block.
STALE_FACTOR = 4


class Tier:
    """Blocks of at most `capacity` bytes together. A block is never evicted before its children in the tier."""

    def __init__(self, capacity: int, *, whole: bool = False) -> None:
        """With `whole`, the state of a block contains all positions from 0 to the block's end."""
        self.capacity = capacity
        self._whole = whole
        self.bytes = 0
        self._sizes: dict[Block, int] = {}
        self._entries: dict[Block, tuple[float, int]] = {}  # priority, and a number that orders equal priorities
        self._child_counts: dict[Block, int] = {}  # number of a block's children in the tier, unless it is 0
        self._heap: list[tuple[float, int, Block]] = []
        self._number = count()
        self._clock = 0.0
        self.on_change: Callable[[Block, bool], None] | None = None
        """Called with each block that enters (True) or leaves (False) the tier."""

    def __contains__(self, block: Block) -> bool:
        return block in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, block: Block, size: int) -> None:
        """Adds `block` with a state of `size` bytes, and marks it as used now. The tier may exceed its capacity until
        `pop` has returned None."""
        assert block not in self._sizes, "a tier holds a block once"
        self._sizes[block] = size
        self.bytes += size
        if block.parent is not None:
            self._child_counts[block.parent] = self._child_counts.get(block.parent, 0) + 1
        self.touch(block)
        if self.on_change is not None:
            self.on_change(block, True)

    def resize(self, block: Block, size: int) -> None:
        """Sets the size of `block` in bytes."""
        self.bytes += size - self._sizes[block]
        self._sizes[block] = size

    def touch(self, block: Block) -> None:
        """Marks `block` as used now."""
        cost = block.end if self._whole else block.cost
        self._entries[block] = self._clock + cost / max(1, self._sizes[block]), next(self._number)
        self._push(block)

    def _push(self, block: Block) -> None:
        heappush(self._heap, (*self._entries[block], block))
        if len(self._heap) > STALE_FACTOR * len(self._sizes) + STALE_FACTOR:
            self._heap = [(*entry, block) for block, entry in self._entries.items()]
            heapify(self._heap)

    def pop(self) -> Block | None:
        """Evicts the block of lowest priority if the tier exceeds its capacity. Returns the block; None if none must
        go."""
        while self.bytes > self.capacity and self._heap:
            priority, number, block = heappop(self._heap)
            if self._entries.get(block) != (priority, number) or self._child_counts.get(block):
                continue  # outdated, or the block has children and is pushed again with its last child's removal
            self._clock = max(self._clock, priority)  # a parent can have a lower priority than its evicted children had
            self.remove(block)
            return block
        return None

    def remove(self, block: Block) -> None:
        """Removes `block`."""
        self.bytes -= self._sizes.pop(block)
        del self._entries[block]
        if self.on_change is not None:
            self.on_change(block, False)
        parent = block.parent
        if parent is None:
            return
        self._child_counts[parent] -= 1
        if not self._child_counts[parent]:
            del self._child_counts[parent]
            if parent in self._sizes:
                self._push(parent)
