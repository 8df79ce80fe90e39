"""The tree of the blocks that the offload tiers store.

Equal prefixes are one path, so a prefix of a thousand conversations is stored once. A block can lack a state and still
have children with states: the children can be used only while the tokens before them are resident in the context.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import islice

from engine.kv.block import BLOCK_TOKENS, MAX_SIBLINGS, Block, BlockChain, root_key

# Number of recent sequences, resident and stored ones each, that are searched for parts of a changed prompt. A search
# takes time proportional to the length of the sequence.
RECENT_SEQUENCES = 2


class BlockTree:
    """The blocks of all salts. Belongs to the engine thread.

    `whole` is True for contexts whose states are not divisible. The state of a block then contains all positions from 0
    to the block's end, and is loaded only as a whole.
    """

    def __init__(self, stored: Callable[[Block], bool], *, whole: bool = False) -> None:
        """`stored` returns True if the state of a block is in a tier."""
        self.version = 0
        """Grows whenever a block leaves the tree."""
        self.whole = whole
        self._stored = stored
        self._roots: dict[str, Block] = {}

    # ── matching ──

    def match(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        """Returns the longest chain of blocks that continues the first `start` of `tokens`; an empty chain if no block
        does."""
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
        """Yields the blocks along `tokens`, each with the number of its tokens that match. Only the last block can
        match in part."""
        block = self._roots.get(root_key(salt))
        while block is not None and block.full:
            block, size = block.nearest(tokens)
            if block is not None:
                yield block, size
            if block is None or size < len(block.tokens):
                return

    def _deepest(self, tokens: array[int], salt: str, start: int) -> BlockChain:
        """Returns the stored block with the longest prefix of `tokens`, unless it ends at or before `start`."""
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
        """Returns the stored blocks of `tokens`, keyed by their start."""
        return {
            block.start: block
            for block, size in self._path(tokens, salt)
            if size == min(len(block.tokens), len(tokens) - block.start) and self._stored(block)
        }

    def recent(self, tokens: array[int], salt: str) -> list[array[int]]:
        """Returns the most recently stored token sequences that branch off `tokens`, the latest first."""
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
        """Returns the root with this key (`root_key`). Creates it if it does not exist."""
        return self._roots.setdefault(key, Block(None, 0, array("i"), key))

    def missing(self, tokens: array[int], salt: str, start: int) -> list[Block]:
        """Returns the blocks of `tokens` from `start` on that are not stored, and creates those that do not exist. With
        `whole`, returns only the block that ends at the last token.

        The caller passes each block to `Offload.put` or to `prune`.
        """
        blocks: list[Block] = []
        block = self.root(root_key(salt)) if len(tokens) > start else None
        while block is not None and block.end < len(tokens):
            block = self._next(block, tokens)
            if block.end > start and not self._stored(block):
                blocks.append(block)
        return [block for block in blocks if block.end == len(tokens)] if self.whole else blocks

    def _next(self, parent: Block, tokens: array[int]) -> Block:
        """Returns the block of `tokens` after `parent`, or a longer stored block that begins with these tokens."""
        ahead = tokens[parent.end : parent.end + BLOCK_TOKENS]
        nearest, size = parent.nearest(tokens)
        longer = nearest is not None and size == len(ahead) < len(nearest.tokens)
        if nearest is not None and longer and self._stored(nearest) and not self.whole:
            return nearest
        return parent.child(ahead)

    def attach(self, block: Block) -> None:
        """Puts `block` and its parents back into the tree if they were pruned since `missing` returned the block."""
        while (parent := block.parent) is not None:
            parent.children.setdefault(block.tokens.tobytes(), block)
            block = parent
        self._roots.setdefault(block.key, block)

    def prune(self, block: Block) -> None:
        """Removes `block` from the tree unless it has a state, children or pins; then its parent likewise."""
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
        """Returns the last block of `tokens`, or the root if `tokens` is empty. Creates blocks that do not exist. The
        block stays in the tree until `unpin`. The number of tokens must be a multiple of `BLOCK_TOKENS`."""
        block = self.root(root_key(salt))
        while block.end < len(tokens):
            block = block.child(tokens[block.end : block.end + BLOCK_TOKENS])
        block.pins += 1
        return block

    def pin_child(self, block: Block, tokens: array[int]) -> Block:
        """Moves a pin from `block` to its child with `tokens`, which is created if it does not exist. Returns the
        child."""
        child = block.child(tokens)
        child.pins += 1
        self.unpin(block)
        return child

    def unpin(self, block: Block) -> None:
        """Removes one pin, and prunes the block."""
        block.pins -= 1
        self.prune(block)

    # ── checks ──

    def blocks(self) -> Iterator[Block]:
        """Yields every block except the roots."""
        blocks = [child for root in self._roots.values() for child in root.children.values()]
        while blocks:
            block = blocks.pop()
            blocks += block.children.values()
            yield block

    def check(self) -> None:
        """Raises AssertionError unless blocks are aligned, needed, and full where they have children."""
        for block in self.blocks():
            assert block.start % BLOCK_TOKENS == 0 or self.whole, "blocks are aligned"
            assert block.children or block.pins or self._stored(block), "a block without a state has children or pins"
            assert block.full or not block.children, "a short block has no children"
