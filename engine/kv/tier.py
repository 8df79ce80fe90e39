"""One tier of the offloaded blocks: the blocks that it holds, and the order of their eviction.

GreedyDual (Young 1994; Cao and Irani 1997, "Cost-aware WWW proxy caching algorithms"): a block's priority is the tier's
clock at its last use plus its cost of recomputation per byte; the block of lowest priority is evicted, and the clock
advances to that priority. With equal costs that is LRU.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count

from engine.kv.block import Block

# Heap entries for each block above which the outdated ones are dropped.
STALE_FACTOR = 4


class Tier:
    """At most `capacity` bytes of blocks. A block is never evicted before its children."""

    def __init__(self, capacity: int, *, whole: bool = False) -> None:
        """With `whole` a block's state is that of the whole sequence up to its end."""
        self.capacity = capacity
        self._whole = whole
        self.bytes = 0
        self._sizes: dict[Block, int] = {}
        self._entries: dict[Block, tuple[float, int]] = {}  # priority, and a number that orders equal ones
        self._children: dict[Block, int] = {}
        self._heap: list[tuple[float, int, Block]] = []
        self._number = count()
        self._clock = 0.0

    def __contains__(self, block: Block) -> bool:
        return block in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, block: Block, size: int) -> None:
        """Adds `size` bytes of `block`, used now. May exceed the capacity: see `pop`."""
        assert block not in self._sizes, "a tier holds a block once"
        self._sizes[block] = size
        self.bytes += size
        if block.parent is not None:
            self._children[block.parent] = self._children.get(block.parent, 0) + 1
        self.touch(block)

    def resize(self, block: Block, size: int) -> None:
        """Corrects the bytes of `block`."""
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
        """Removes and returns the block of lowest priority while the tier exceeds its capacity."""
        while self.bytes > self.capacity and self._heap:
            priority, number, block = heappop(self._heap)
            if self._entries.get(block) != (priority, number) or self._children.get(block):
                continue  # used since, or pushed again when its last child leaves
            self._clock = max(self._clock, priority)  # a parent may have a lower priority than its children had
            self.remove(block)
            return block
        return None

    def remove(self, block: Block) -> None:
        """Removes `block`."""
        self.bytes -= self._sizes.pop(block)
        del self._entries[block]
        parent = block.parent
        if parent is None:
            return
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if parent in self._sizes:
                self._push(parent)
