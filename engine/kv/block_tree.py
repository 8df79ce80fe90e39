"""The tree of stored blocks: which tokens the offload tiers know, and which block follows which.

Equal prefixes are one path, so a prefix of a thousand conversations is stored once. A block without a state of its own
only leads to others: its tokens have to be resident in the context, or the blocks after it cannot be used.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice

from engine.kv.block import BLOCK_TOKENS, MAX_SIBLINGS, Block, BlockChain, root_key

# How many recently stored sequences are searched for parts of a changed prompt.
RECENT_SEQUENCES = 2


class BlockTree:
    """The blocks of every namespace. Belongs to the engine thread.

    With `whole`, for contexts whose states are not divisible, a block's state is that of all positions up to its end
    and cannot be used for fewer.
    """

    def __init__(self, stored: Callable[[Block], bool], *, whole: bool = False) -> None:
        """`stored` returns True for a block whose state is in a tier."""
        self.version = 0
        """Grows whenever a block leaves the tree."""
        self.whole = whole
        self._stored = stored
        self._roots: dict[str, Block] = {}

    # ── matching ──

    def match(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        """Returns the blocks that continue the first `start` of `tokens` furthest; none if no block does."""
        if self.whole:
            return self._deepest(tokens, salt, start)
        chain: list[Block] = []
        for block, size in self._path(tokens, salt):
            if block.start + size > start:
                if not self._stored(block):
                    break
                chain.append(block)
                start = block.start + size
        return BlockChain(tuple(chain), start)

    def _path(self, tokens: array[int], salt: str) -> Iterator[tuple[Block, int]]:
        """The blocks along `tokens` from their start, each with the number of its tokens that match; only the last
        may match in part."""
        block = self._roots.get(root_key(salt))
        while block is not None and block.full:
            block, size = block.nearest(tokens)
            if block is not None:
                yield block, size
            if block is None or size < len(block.tokens):
                return

    def _deepest(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        best: Block | None = None
        block = self._roots.get(root_key(salt))
        while block is not None and block.full:
            ahead = tokens[block.end : block.end + BLOCK_TOKENS]
            for child in islice(reversed(block.children.values()), MAX_SIBLINGS):
                if self._stored(child) and child.is_prefix_of(ahead) and (best is None or child.end > best.end):
                    best = child
            block = block.children.get(ahead.tobytes())
        if best is None or best.end <= start:
            return BlockChain((), start)
        return BlockChain((best,), best.end)

    def blocks_of(self, tokens: array[int], salt: str) -> dict[int, Block]:
        """Returns the blocks of `tokens` that have a state, by their start."""
        return {
            block.start: block
            for block, size in self._path(tokens, salt)
            if size == min(len(block.tokens), len(tokens) - block.start) and self._stored(block)
        }

    def recent(self, tokens: array[int], salt: str) -> list[array[int]]:
        """Returns the token sequences stored most recently that branch off `tokens`, the latest first."""
        fork = self._roots.get(root_key(salt))
        while fork is not None and (child := fork.children.get(tokens[fork.end : fork.end + BLOCK_TOKENS].tobytes())):
            fork = child
        found: list[array[int]] = []
        for block in islice(reversed(fork.children.values()), RECENT_SEQUENCES) if fork is not None else ():
            while block.children:
                block = next(reversed(block.children.values()))
            found.append(block.prefix)
        return found

    # ── growing ──

    def root(self, key: str) -> Block:
        """Returns the root of the namespace with this key (`root_key`), which is created if need be."""
        return self._roots.setdefault(key, Block(None, 0, array("i"), key))

    def missing(self, tokens: array[int], salt: str, start: int) -> list[Block]:
        """Returns the blocks of `tokens` from `start` on that have no state; they are created if need be. With `whole`
        that is only the last one of all.

        The caller gives each of them a state by `Offload.put`, or drops it by `prune`.
        """
        blocks: list[Block] = []
        block = self.root(root_key(salt)) if len(tokens) > start else None
        while block is not None and block.end < len(tokens):
            block = self._next(block, tokens)
            if block.end > start and not self._stored(block):
                blocks.append(block)
        return [block for block in blocks if block.end == len(tokens)] if self.whole else blocks

    def _next(self, parent: Block, tokens: array[int]) -> Block:
        """The block of `tokens` after `parent`, or a longer one with a state that begins with these tokens."""
        ahead = tokens[parent.end : parent.end + BLOCK_TOKENS]
        nearest, size = parent.nearest(tokens)
        longer = nearest is not None and size == len(ahead) < len(nearest.tokens)
        if nearest is not None and longer and self._stored(nearest) and not self.whole:
            return nearest
        return parent.child(ahead)

    def attach(self, block: Block) -> None:
        """Puts `block` back into the tree if its parents were pruned since `missing` returned it."""
        while (parent := block.parent) is not None:
            parent.children.setdefault(block.tokens.tobytes(), block)
            block = parent
        self._roots.setdefault(block.key, block)

    def prune(self, block: Block) -> None:
        """Takes `block` and its parents out of the tree as far as they have neither states nor children nor pins."""
        while not (block.children or block.pins or self._stored(block)):
            parent = block.parent
            if parent is None:
                if self._roots.get(block.key) is block:
                    del self._roots[block.key]
                return
            if parent.children.get(name := block.tokens.tobytes()) is block:
                del parent.children[name]
                self.version += 1
            block = parent

    # ── pins ──

    def pin(self, tokens: array[int], salt: str) -> Block:
        """Returns the last block of `tokens`, whose number is a multiple of `BLOCK_TOKENS`; the root if there are
        none. Blocks are created if need be, and stay in the tree until `unpin`."""
        block = self.root(root_key(salt))
        while block.end < len(tokens):
            block = block.child(tokens[block.end : block.end + BLOCK_TOKENS])
        block.pins += 1
        return block

    def pin_child(self, block: Block, tokens: array[int]) -> Block:
        """Moves a pin from `block` to its child of `tokens`, which is created if need be. Returns the child."""
        child = block.child(tokens)
        child.pins += 1
        self.unpin(block)
        return child

    def unpin(self, block: Block) -> None:
        """Undoes a `pin`."""
        block.pins -= 1
        self.prune(block)

    # ── checks ──

    def blocks(self) -> Iterator[Block]:
        """Yields every block, roots excepted."""
        blocks = [child for root in self._roots.values() for child in root.children.values()]
        while blocks:
            block = blocks.pop()
            blocks += block.children.values()
            yield block

    def check(self) -> None:
        """Raises AssertionError unless the tree is sound."""
        for block in self.blocks():
            assert block.start % BLOCK_TOKENS == 0 or self.whole, "blocks are aligned"
            assert block.children or block.pins or self._stored(block), "a block without a state has children or pins"
            assert block.full or not block.children, "a short block has no children"
